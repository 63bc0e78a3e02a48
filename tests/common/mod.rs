//! What the tests of the model share: Python beside them, the files that it writes, and how far tensors lie apart.

use std::path::{Path, PathBuf};
use std::process::Command;

use laps::model::Batch;
use tch::{Kind, Tensor};

/// What tests/_rust_models.py makes.
pub const MODELS: [&str; 8] = ["vit", "swin", "clip", "paper", "all patches", "image", "dot", "top-k"];

pub fn python() -> Command {
    let mut command = Command::new(if cfg!(windows) { "python" } else { "python3" });
    command.env("OMP_NUM_THREADS", "1").env("HF_HUB_OFFLINE", "1");
    command
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("python3 on the PATH");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// An empty folder of this process.
pub fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

pub fn named(file: PathBuf) -> impl Fn(&str) -> Tensor {
    let tensors = Tensor::read_safetensors(file).unwrap();
    move |name| {
        tensors.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}")).1.shallow_clone()
    }
}

pub fn batch(folder: &Path) -> Batch {
    let tensor = named(folder.join("batch.safetensors"));
    Batch {
        pixels: tensor("pixels"),
        ids: tensor("ids"),
        lengths: tensor("lengths"),
        images: tensor("images"),
    }
}

pub fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}
