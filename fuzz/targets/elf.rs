//! ELF files: whatever a target maps is opened and looked through.
#![no_main]

use std::{
    cell::RefCell,
    fs::File,
    io::{Seek as _, Write as _},
    os::fd::FromRawFd as _,
};

use libfuzzer_sys::fuzz_target;
use loopguard::runtime::{
    elf::{Image, SymbolTable},
    probe_site::function_starts,
};

thread_local! {
    static FILE: RefCell<File> = RefCell::new({
        unsafe extern "C" {
            fn memfd_create(name: *const std::ffi::c_char, flags: std::ffi::c_uint) -> std::ffi::c_int;
        }
        // SAFETY: a constant name; the result is a descriptor that nothing else owns, or negative.
        let descriptor = unsafe { memfd_create(c"elf".as_ptr(), 0) };
        assert!(descriptor >= 0, "no file in memory");
        // SAFETY: just opened.
        unsafe { File::from_raw_fd(descriptor) }
    });
}

fuzz_target!(|bytes: &[u8]| {
    FILE.with_borrow_mut(|file| {
        file.set_len(0).unwrap();
        file.rewind().unwrap();
        file.write_all(bytes).unwrap();
        if let Ok(image) = Image::of_file(file.try_clone().unwrap()) {
            look_through(&image);
        }
    });
});

fn look_through(image: &Image) {
    let _ = image.symbols(["_PyRuntime", "PyDict_Type"]);
    for table in [SymbolTable::Dynamic, SymbolTable::Full] {
        image.each_symbol(table, |_, symbol| {
            let _ = image.file_offset(symbol.address);
            let _ = image.bytes_at(symbol.address, 64);
        });
    }
    for name in [".text", ".rodata", ".eh_frame", ".eh_frame_hdr", ".note.gnu.build-id", ".note.stapsdt", ".data.rel.ro"] {
        if let Some((address, _)) = image.section_bytes(name) {
            let _ = image.bytes_to_segment_end(address);
        }
    }
    let _ = image.unwind_segment();
    for offset in [0, 1, 4095, 4096, u64::MAX] {
        let _ = image.address_of(offset);
        let _ = image.file_offset(offset);
    }
    let _ = function_starts(image);
}
