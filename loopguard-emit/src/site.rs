//! Turns a probe into machine code: a no-op at a place a tracer can patch, and a note that says where it is.
//!
//! The note's format is SystemTap's (sys/sdt.h, "stapsdt" version 3): three addresses, then provider, probe and
//! arguments as strings. The base section lets a reader correct the addresses if the file was prelinked.
//!
//! On x86_64 the no-op is 5 bytes long, which newer kernels patch into a call instead of a trap. It must not straddle a
//! cache line, hence the alignment; and the call pushes onto the stack, so nothing may lie in the red zone below it:
//! the assembly does not say `nostack`, which makes the compiler keep it free.

#[cfg(all(target_os = "linux", target_pointer_width = "64", any(target_arch = "x86_64", target_arch = "aarch64")))]
macro_rules! site {
    ($name:literal, $arguments:literal, $($operand:ident = $value:expr),* $(,)?) => {
        // SAFETY: a no-op, and data in sections of its own; it changes neither registers nor memory.
        unsafe {
            site_code!(
                $name,
                ".pushsection .note.stapsdt,\"?\",\"note\"",
                ".balign 4",
                ".4byte 992f-991f, 994f-993f, 3",
                "991: .asciz \"stapsdt\"",
                "992: .balign 4",
                "993: .8byte 990b",
                ".8byte _.stapsdt.base",
                // No semaphore: the probe's arguments are at hand anyway, so there is nothing to skip.
                ".8byte 0",
                ".asciz \"loopguard\"",
                concat!(".asciz \"", $name, "\""),
                concat!(".asciz \"", $arguments, "\""),
                "994: .balign 4",
                ".popsection",
                ".ifndef _.stapsdt.base",
                // Retained (R): nothing but the notes refers to it, and linkers may leave out what those refer to.
                ".pushsection .stapsdt.base,\"aGR\",\"progbits\",.stapsdt.base,comdat",
                ".weak _.stapsdt.base",
                ".hidden _.stapsdt.base",
                "_.stapsdt.base: .space 1",
                ".size _.stapsdt.base, 1",
                ".popsection",
                ".endif",
                ; $($operand = $value),*
            )
        }
    };
}

#[cfg(all(target_os = "linux", target_pointer_width = "64", target_arch = "x86_64"))]
macro_rules! site_code {
    ($name:literal, $($line:expr,)* ; $($operand:ident = $value:expr),*) => {
        core::arch::asm!(
            ".balign 8",
            site_label!($name),
            "990: .byte 0x0f, 0x1f, 0x44, 0x00, 0x00",
            $($line,)*
            $($operand = in(reg) $value,)*
            options(att_syntax, readonly, preserves_flags),
        )
    };
}

#[cfg(all(target_os = "linux", target_pointer_width = "64", target_arch = "aarch64"))]
macro_rules! site_code {
    ($name:literal, $($line:expr,)* ; $($operand:ident = $value:expr),*) => {
        core::arch::asm!(
            site_label!($name),
            "990: nop",
            $($line,)*
            $($operand = in(reg) $value,)*
            options(readonly, preserves_flags),
        )
    };
}

#[cfg(not(all(
    target_os = "linux",
    target_pointer_width = "64",
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
macro_rules! site {
    ($name:literal, $arguments:literal, $($operand:ident = $value:expr),* $(,)?) => {
        let _ = ($($value),*);
    };
}

/// For `is_patched!`. Weak, and given once, since the compiler may copy a function.
#[cfg(all(target_os = "linux", target_pointer_width = "64", any(target_arch = "x86_64", target_arch = "aarch64")))]
macro_rules! site_label {
    ($name:literal) => {
        concat!(
            ".ifndef _loopguard.",
            $name,
            "\n.weak _loopguard.",
            $name,
            "\n.hidden _loopguard.",
            $name,
            "\n_loopguard.",
            $name,
            ":\n.endif"
        )
    };
}

/// Whether a tracer has put something else in the place of a probe's no-op.
#[cfg(all(target_os = "linux", target_pointer_width = "64", any(target_arch = "x86_64", target_arch = "aarch64")))]
macro_rules! is_patched {
    ($name:literal) => {{
        unsafe extern "C" {
            #[link_name = concat!("_loopguard.", $name)]
            static SITE: u32;
        }
        let no_op = if cfg!(target_arch = "x86_64") { [0x0f, 0x1f, 0x44, 0x00] } else { [0x1f, 0x20, 0x03, 0xd5] };
        // SAFETY: four aligned bytes of our own code, which others may write.
        unsafe { core::ptr::read_volatile(&raw const SITE) != u32::from_ne_bytes(no_op) }
    }};
}

#[cfg(not(all(
    target_os = "linux",
    target_pointer_width = "64",
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
macro_rules! is_patched {
    ($name:literal) => {
        false
    };
}
