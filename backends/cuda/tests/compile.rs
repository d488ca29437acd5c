//! Every kernel compiles for the oldest architecture that is taken and for a newer one. Needs the
//! run-time compiler's library and no device; says so and passes where it is not installed.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use pontoon_cuda::ffi::compiler::Compiler;
use pontoon_cuda::modules::samples;

fn compile_for(capability: (i32, i32)) {
    let compiler = match Compiler::alone() {
        Ok(compiler) => compiler,
        Err(error) => return eprintln!("not run: {}", error.text),
    };
    for unit in samples(capability) {
        let code = unit.compile(&compiler, capability).unwrap();
        assert!(code.starts_with(b"\x7fELF"), "{unit:?} gives no machine code");
    }
}

#[test]
fn every_kernel_compiles_for_the_oldest_architecture() {
    compile_for((8, 0));
}

#[test]
fn every_kernel_compiles_for_a_newer_architecture() {
    compile_for((9, 0));
}

#[test]
fn what_does_not_compile_is_named_in_one_line() {
    let Ok(compiler) = Compiler::alone() else { return eprintln!("not run: no compiler here") };
    let options = ["--gpu-architecture=sm_80".to_owned()];
    let error = compiler.compile("broken.cu", "int f( { }", &options).unwrap_err();
    assert!(error.text.starts_with("broken.cu does not compile here: "), "{error}");
    assert!(error.text.contains("error") && !error.text.contains('\n'), "{error}");
}
