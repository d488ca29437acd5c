//! Where the vendor's libraries are missing, one line says what was looked for.

use pontoon_cuda::Library;

#[test]
fn a_missing_driver_or_compiler_is_named_in_one_line() {
    match Library::open() {
        Ok(_) => eprintln!("not run: the libraries are here"),
        Err(error) => {
            let named = error.text.contains("libcuda.so.1") || error.text.contains("libnvrtc.so");
            assert!(named && !error.text.contains('\n'), "{error}");
        }
    }
}
