//! With the feature `torch`: lets this package's examples and tests find the libtorch that torch-sys has found.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Set by torch-sys, whose `links` key is tch, for those that depend on it directly.
    if let Ok(folder) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
