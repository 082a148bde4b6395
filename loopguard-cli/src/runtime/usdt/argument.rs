//! Turns the text that says where a probe's arguments are into operands.
//!
//! Each argument is `SIZE@OPERAND`, the size in bytes and negative for a signed value; the operand is what the compiler
//! put into the assembly, so each architecture has its own (GNU as, AT&T syntax on x86_64). Seen in the wild are
//! constants, registers and memory operands of all kinds; what is anything else is an error, not a guess.

/// Bytes of `struct pt_regs`'s members are counted from its start, on the machine itself.
type RegisterOffset = u16;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Bytes; negative: signed.
    pub size: i8,
    pub operand: Operand,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operand {
    Constant(i64),
    Register {
        register: RegisterOffset,
        /// The value begins at this bit.
        shift: u8,
    },
    /// At `base + (index << scale) + offset`.
    Memory {
        base: Option<RegisterOffset>,
        index: Option<(RegisterOffset, u8)>,
        offset: i64,
    },
    /// At a symbol.
    Symbol {
        name: String,
        offset: i64,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("{0:?} is no argument this loopguard can read")]
    Argument(String),
    #[error("it has {found} arguments instead of {expected}")]
    Count { expected: usize, found: usize },
    #[error("an argument is at a symbol that the file does not have")]
    Symbol,
    #[error("the file is for another kind of processor")]
    Machine,
}

/// How an architecture writes operands.
pub trait Syntax {
    fn operand(text: &str) -> Option<Operand>;
}

/// The arguments in a note's text.
///
/// # Errors
/// `Argument` with the first one that is not understood.
pub fn parse<S: Syntax>(text: &str) -> Result<Vec<Argument>, Unreadable> {
    split(text).map(|text| argument::<S>(text).ok_or_else(|| Unreadable::Argument(text.to_owned()))).collect()
}

/// Spaces separate arguments, but not inside brackets: `8@[sp, 16]`.
fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0usize;
    text.split(move |char: char| {
        match char {
            '[' | '(' => depth += 1,
            ']' | ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && char.is_ascii_whitespace()
    })
    .filter(|text| !text.is_empty())
}

fn argument<S: Syntax>(text: &str) -> Option<Argument> {
    let (size, operand) = match text.split_once('@') {
        Some((size, operand)) => (size.parse().ok()?, operand),
        // The size may be left out: then it is that of a register.
        None => (8, text),
    };
    if !matches!(size, 1 | 2 | 4 | 8 | -1 | -2 | -4 | -8) {
        return None;
    }
    Some(Argument { size, operand: S::operand(operand)? })
}

/// A decimal or hexadecimal number with an optional sign. Constants above `i64::MAX` are unsigned ones.
fn number(text: &str) -> Option<i64> {
    let (is_negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let value = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        // `from_str_radix` would take a second sign.
        Some(hex) if hex.starts_with(|char: char| char.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16).ok()?,
        None if digits.starts_with(|char: char| char.is_ascii_digit()) => digits.parse::<u64>().ok()?,
        _ => return None,
    };
    Some(if is_negative { (value as i64).wrapping_neg() } else { value as i64 })
}

/// AT&T syntax.
pub enum X86 {}

impl Syntax for X86 {
    fn operand(text: &str) -> Option<Operand> {
        if let Some(constant) = text.strip_prefix('$') {
            return number(constant).map(Operand::Constant);
        }
        if let Some(name) = text.strip_prefix('%') {
            let (register, shift) = x86_register(name)?;
            return Some(Operand::Register { register, shift });
        }
        x86_memory(text)
    }
}

/// `offset(base,index,scale)`, each part optional, or `symbol+offset(%rip)`.
fn x86_memory(text: &str) -> Option<Operand> {
    let Some((before, inside)) = text.strip_suffix(')').and_then(|text| text.split_once('(')) else {
        // An absolute address.
        return Some(Operand::Memory { base: None, index: None, offset: number(text)? });
    };
    let mut parts = inside.split(',').map(str::trim);
    let (base, index, scale) = (parts.next()?, parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    if parts.next().is_some() {
        return None;
    }
    if base == "%rip" {
        // A number alone is relative to an instruction whose length nobody told.
        let end = before.find(['+', '-']).unwrap_or(before.len());
        let (name, offset) = before.split_at(end);
        let is_symbol = name.starts_with(|char: char| char.is_ascii_alphabetic() || matches!(char, '_' | '.' | '$'));
        let offset = if offset.is_empty() { 0 } else { number(offset)? };
        return (is_symbol && index.is_empty()).then(|| Operand::Symbol { name: name.to_owned(), offset });
    }
    let whole = |name: &str| match x86_register(name.strip_prefix('%')?)? {
        (register, 0) => Some(register),
        _ => None,
    };
    let base = if base.is_empty() { None } else { Some(whole(base)?) };
    let index = if index.is_empty() { None } else { Some((whole(index)?, shift(scale)?)) };
    let offset = if before.is_empty() { 0 } else { number(before)? };
    (base.is_some() || index.is_some()).then_some(Operand::Memory { base, index, offset })
}

/// The factor of an index register as a shift.
fn shift(scale: &str) -> Option<u8> {
    Some(match scale {
        "" | "1" => 0,
        "2" => 1,
        "4" => 2,
        "8" => 3,
        _ => return None,
    })
}

/// Where a register, or the part of one, is in `struct pt_regs` (arch/x86/include/asm/ptrace.h).
fn x86_register(name: &str) -> Option<(RegisterOffset, u8)> {
    const ORDER: [&str; 15] =
        ["r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di"];
    let at = |name: &str| ORDER.iter().position(|known| *known == name).map(|index| index as u16 * 8);
    let named = |name: &str| match name {
        "ip" => Some(16 * 8),
        "sp" => Some(19 * 8),
        _ => at(name),
    };
    // Numbered ones: r8, r8d, r8w, r8b.
    if name.strip_prefix('r').is_some_and(|rest| rest.starts_with(|char: char| char.is_ascii_digit())) {
        return at(name.trim_end_matches(['d', 'w', 'b'])).map(|offset| (offset, 0));
    }
    let low_byte = |letter: &str| named(&format!("{letter}x")).or_else(|| named(letter));
    match name.len() {
        3 if name.starts_with(['r', 'e']) => named(&name[1..]).map(|offset| (offset, 0)),
        3 => name.strip_suffix('l').and_then(named).map(|offset| (offset, 0)),
        2 => named(name).map(|offset| (offset, 0)).or_else(|| {
            let (letter, part) = name.split_at_checked(1)?;
            match part {
                "l" => low_byte(letter).map(|offset| (offset, 0)),
                "h" if "abcd".contains(letter) => low_byte(letter).map(|offset| (offset, 8)),
                _ => None,
            }
        }),
        _ => None,
    }
}

/// What GCC and LLVM write for aarch64.
pub enum Aarch64 {}

impl Syntax for Aarch64 {
    fn operand(text: &str) -> Option<Operand> {
        if let Some(inside) = text.strip_prefix('[') {
            return aarch64_memory(inside.strip_suffix(']')?);
        }
        match aarch64_register(text) {
            Some(Aarch64Register::At(register)) => Some(Operand::Register { register, shift: 0 }),
            Some(Aarch64Register::Zero) => Some(Operand::Constant(0)),
            None => number(text.trim_start_matches(['#', '$'])).map(Operand::Constant),
        }
    }
}

/// `base`, `base, offset`, or `base, index[, lsl shift]`.
fn aarch64_memory(inside: &str) -> Option<Operand> {
    let mut parts = inside.split(',').map(str::trim);
    let Aarch64Register::At(base) = aarch64_register(parts.next()?)? else { return None };
    let base = Some(base);
    let operand = match parts.next() {
        None => Operand::Memory { base, index: None, offset: 0 },
        Some(second) => match aarch64_register(second) {
            None => Operand::Memory { base, index: None, offset: number(second.trim_start_matches('#'))? },
            Some(Aarch64Register::Zero) => return None,
            // Only whole registers: the others would have to be extended first.
            Some(Aarch64Register::At(_)) if !second.starts_with('x') => return None,
            Some(Aarch64Register::At(index)) => {
                let shift = match parts.next() {
                    None => 0,
                    Some(shift) => number(shift.strip_prefix("lsl")?.trim_start().trim_start_matches('#'))?,
                };
                let shift = u8::try_from(shift).ok().filter(|shift| *shift <= 4)?;
                Operand::Memory { base, index: Some((index, shift)), offset: 0 }
            }
        },
    };
    parts.next().is_none().then_some(operand)
}

enum Aarch64Register {
    At(RegisterOffset),
    Zero,
}

/// Where a register is in `struct pt_regs` (arch/arm64/include/asm/ptrace.h): 31 general ones, then `sp` and `pc`.
fn aarch64_register(name: &str) -> Option<Aarch64Register> {
    let index: u16 = match name {
        "sp" | "wsp" => 31,
        "xzr" | "wzr" => return Some(Aarch64Register::Zero),
        "lr" => 30,
        "fp" => 29,
        _ => {
            let digits = name.strip_prefix(['x', 'w'])?;
            digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())??
        }
    };
    (index <= 31 && name != "x31" && name != "w31").then_some(Aarch64Register::At(index * 8))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One argument a line: what comes out, or `-` where it is refused.
    fn check<S: Syntax>(cases: &[(&str, &str)]) {
        for (text, expected) in cases {
            let told = match parse::<S>(text) {
                Ok(arguments) => arguments.iter().map(show).collect::<Vec<_>>().join(" | "),
                Err(_) => "-".to_owned(),
            };
            assert_eq!(told, *expected, "{text}");
        }
    }

    fn show(argument: &Argument) -> String {
        let operand = match &argument.operand {
            Operand::Constant(value) => format!("{value}"),
            Operand::Register { register, shift: 0 } => format!("r{register}"),
            Operand::Register { register, shift } => format!("r{register}>>{shift}"),
            Operand::Memory { base, index, offset } => {
                let base = base.map(|base| format!("r{base}")).unwrap_or_default();
                let index = index.map(|(index, shift)| format!("+r{index}<<{shift}")).unwrap_or_default();
                format!("[{base}{index}{offset:+}]")
            }
            Operand::Symbol { name, offset } => format!("[{name}{offset:+}]"),
        };
        format!("{}:{operand}", argument.size)
    }

    #[test]
    fn x86_constants() {
        check::<X86>(&[
            ("8@$5", "8:5"),
            ("-4@$-9", "-4:-9"),
            ("4@$0x1f", "4:31"),
            ("8@$18446744073709551615", "8:-1"),
            ("8@$", "-"),
            ("8@$--1", "-"),
            ("8@$0x", "-"),
            ("8@$0x+1", "-"),
            ("8@$5x", "-"),
        ]);
    }

    #[test]
    fn x86_registers() {
        check::<X86>(&[
            ("8@%rdi", "8:r112"),
            ("-4@%edi", "-4:r112"),
            ("2@%di", "2:r112"),
            ("1@%dil", "1:r112"),
            ("8@%rax 4@%eax 2@%ax 1@%al 1@%ah", "8:r80 | 4:r80 | 2:r80 | 1:r80 | 1:r80>>8"),
            ("8@%r8 4@%r8d 2@%r8w -1@%r8b", "8:r72 | 4:r72 | 2:r72 | -1:r72"),
            ("8@%r15 4@%r15d 8@%r10", "8:r0 | 4:r0 | 8:r56"),
            ("8@%rsp 8@%rbp 1@%spl 1@%bpl 1@%sil", "8:r152 | 8:r32 | 1:r152 | 1:r32 | 1:r104"),
            ("%rbx", "8:r40"),
            ("8@%r16", "-"),
            ("8@%xmm0", "-"),
            ("8@%rzz", "-"),
            ("8@%", "-"),
            ("1@%sih", "-"),
            ("3@%rdi", "-"),
            ("@%rdi", "-"),
            ("8f@%xmm1", "-"),
        ]);
    }

    #[test]
    fn x86_memory() {
        check::<X86>(&[
            ("8@(%rsp)", "8:[r152+0]"),
            ("-4@-20(%rbp)", "-4:[r32-20]"),
            ("8@0x18(%rsp)", "8:[r152+24]"),
            ("8@-16(%rbp,%rax,8)", "8:[r32+r80<<3-16]"),
            ("1@(%rdi,%rsi)", "1:[r112+r104<<0+0]"),
            ("8@(%rdi, %rsi, 4)", "8:[r112+r104<<2+0]"),
            ("4@64(,%rax,4)", "4:[+r80<<2+64]"),
            ("4@0x601040", "4:[+6295616]"),
            ("4@counter(%rip)", "4:[counter+0]"),
            ("4@_ZN3foo3barE+16(%rip)", "4:[_ZN3foo3barE+16]"),
            ("4@counter-4(%rip)", "4:[counter-4]"),
            ("4@16(%rip)", "-"),
            ("4@counter(%rip,%rax,2)", "-"),
            ("8@(%rdi,%rsi,3)", "-"),
            ("8@(%rdi,%rsi,4,5)", "-"),
            ("8@()", "-"),
            ("8@(,)", "-"),
            ("8@(%ah)", "-"),
            // Two bytes, but no two letters.
            ("8@%é", "-"),
            ("8@%fs:16", "-"),
            ("8@%fs:(%rax)", "-"),
            ("8@8(%rdi", "-"),
            ("8@ ", "-"),
        ]);
    }

    #[test]
    fn aarch64_operands() {
        check::<Aarch64>(&[
            ("8@x0 -4@w1 8@x30", "8:r0 | -4:r8 | 8:r240"),
            ("8@sp 8@xzr 4@wzr", "8:r248 | 8:0 | 4:0"),
            ("-4@[sp, 60] 8@x2", "-4:[r248+60] | 8:r16"),
            ("8@[x29, -8]", "8:[r232-8]"),
            ("8@[x29,#-8]", "8:[r232-8]"),
            ("8@[x0]", "8:[r0+0]"),
            ("8@[x0, x1, lsl 3]", "8:[r0+r8<<3+0]"),
            ("8@[x0, x1, lsl #3]", "8:[r0+r8<<3+0]"),
            ("8@[x0, x1]", "8:[r0+r8<<0+0]"),
            ("-4@5 8@#-7 8@$1", "-4:5 | 8:-7 | 8:1"),
            ("8@[x0, w1, sxtw 3]", "-"),
            ("8@[x0, x1, lsl 5]", "-"),
            ("8@[x0, 1, 2]", "-"),
            ("8@[x0", "-"),
            ("8@x31 8@w31", "-"),
            ("8@x", "-"),
            ("8@x99999999999", "-"),
            ("8@d0", "-"),
        ]);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,80}") {
            let _ = (parse::<X86>(&text), parse::<Aarch64>(&text));
        }

        #[test]
        fn text_that_is_nearly_right_is_read_without_a_panic(text in r"(-?[0-9]{0,2}@?[$#%\[]?[-+0-9a-z()\[\], %]{0,12} ?){0,6}") {
            let _ = (parse::<X86>(&text), parse::<Aarch64>(&text));
        }

        #[test]
        fn what_compilers_emit_is_always_read(
            size in prop::sample::select(vec![1, 2, 4, 8, -1, -2, -4, -8]),
            offset: i32,
            base in prop::sample::select(vec!["rax", "rbx", "rsp", "rbp", "r8", "r15"]),
            index in prop::sample::select(vec!["rcx", "rdi", "r9", "r14"]),
            scale in prop::sample::select(vec![1, 2, 4, 8]),
        ) {
            let text = format!("{size}@{offset}(%{base},%{index},{scale}) {size}@${offset} {size}@%{base}");
            let parsed = parse::<X86>(&text).unwrap();
            prop_assert_eq!(parsed.len(), 3);
            prop_assert_eq!(&parsed[1].operand, &Operand::Constant(offset.into()));
        }
    }
}
