//! How well does an image fit each of some sentences? With a model that Python or Rust has saved:
//!
//! ```sh
//! cargo run --release --features torch --example score -- out/demo/laps photo.jpg "a red circle" "a blue square"
//! ```

use std::process::ExitCode;

use laps::LapsError;
use laps::model::Laps;
use tch::Device;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, image, sentences @ ..] = arguments.as_slice() else {
        eprintln!("usage: score MODEL_FOLDER IMAGE SENTENCE...");
        return ExitCode::from(2);
    };
    match score(folder, image, sentences) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn score(folder: &str, image: &str, sentences: &[String]) -> Result<(), LapsError> {
    let model = Laps::from_pretrained(folder, Device::Cpu)?;
    let texts = model.encode_captions(sentences, 64)?;
    let images = model.encode_files(&[image], 1)?;
    let scores = Vec::<f32>::try_from(model.similarity(&images, &texts)?.flatten(0, 1))?;
    let mut ranked: Vec<_> = scores.iter().zip(sentences).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(a.0));
    for (score, sentence) in ranked {
        println!("{score:.3}  {sentence}");
    }
    Ok(())
}
