//! Image files to pixels, as a model's transform.json asks for them.

use std::path::Path;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::{DynamicImage, ImageDecoder, ImageReader, Rgba, RgbaImage, imageops};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::Result;
use super::files::read_json;
use crate::error::LapsError;

const EXPECTED: &str = "a whole PNG or JPEG file";
/// Of an image that an encoder takes.
const MOST_SIDE: u32 = 1 << 14;
/// Of a file that is refused before it is decoded; Pillow's threshold.
const MOST_PIXELS: u64 = 1024 * 1024 * 1024 / 4 / 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    Bicubic,
    Bilinear,
    Nearest,
}

/// How an image becomes the pixels (3, S, S) that an encoder takes; the same values as Python's `ImageTransform`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageTransform {
    /// S
    pub image_size: u32,
    /// Per channel, of pixels in [0, 1].
    pub mean: [f64; 3],
    pub std: [f64; 3],
    /// Of training in Python: the smallest and largest share of an image that a crop keeps.
    pub crop_scale: Option<[f64; 2]>,
    /// Of training in Python: the probability that an image is mirrored.
    pub flip: f64,
    pub interpolation: Interpolation,
}

impl Default for ImageTransform {
    fn default() -> Self {
        ImageTransform {
            image_size: 224,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
            crop_scale: Some([0.6, 1.0]),
            flip: 0.5,
            interpolation: Interpolation::Bicubic,
        }
    }
}

impl ImageTransform {
    /// Of the JSON file in a model's folder.
    pub(super) fn read(file: &Path) -> Result<Self> {
        let expected = "a transform's JSON file";
        let json = read_json("ImageTransform", file, expected)?;
        let transform: ImageTransform = serde_json::from_value(json).map_err(|error| {
            LapsError::file("ImageTransform", file, format!("is wrong: {error}"), expected)
        })?;
        transform.check().map_err(|error| {
            LapsError::file("ImageTransform", file, format!("is wrong: {error}"), expected)
        })?;
        Ok(transform)
    }

    /// Of the `preprocessor_config.json` that lies with an image encoder: the size, mean, standard deviation and
    /// interpolation that it was trained with. What the file does not say stays as it is here.
    pub fn from_preprocessor(file: impl AsRef<Path>) -> Result<Self> {
        let (file, expected) = (file.as_ref(), "the preprocessor_config.json of an image encoder");
        let json = read_json("ImageTransform", file, expected)?;
        let wrong =
            |name: &str| LapsError::file("ImageTransform", file, format!("has another {name}"), expected);
        let mut transform = ImageTransform::default();
        let given = |name: &str| json.get(name).filter(|value| !value.is_null());
        if let Some(size) = given("size") {
            let sides =
                ["height", "width", "shortest_edge"].iter().filter_map(|side| size.get(side)).chain([size]);
            let sides: Vec<u64> = sides.filter_map(serde_json::Value::as_u64).collect();
            let [side, ..] = sides[..] else { return Err(wrong("size")) };
            if sides.iter().any(|&other| other != side) {
                return Err(wrong("size: not a square"));
            }
            transform.image_size = u32::try_from(side).map_err(|_| wrong("size"))?;
        }
        let colours = |name: &'static str, value: &serde_json::Value| {
            serde_json::from_value::<[f64; 3]>(value.clone()).map_err(|_| wrong(name))
        };
        if let Some(mean) = given("image_mean") {
            transform.mean = colours("image_mean", mean)?;
        }
        if let Some(std) = given("image_std") {
            transform.std = colours("image_std", std)?;
        }
        if let Some(resample) = given("resample") {
            // Pillow's numbers.
            transform.interpolation = match resample.as_u64() {
                Some(0) => Interpolation::Nearest,
                Some(2) => Interpolation::Bilinear,
                Some(3) => Interpolation::Bicubic,
                _ => return Err(wrong("resample: 0, 2 or 3")),
            };
        }
        transform.check()?;
        Ok(transform)
    }

    /// Refuses values outside their ranges, naming the first.
    pub fn check(&self) -> Result<()> {
        let refuse = |argument, expected: &str, got: String| {
            Err(LapsError::value("ImageTransform", argument, expected, got))
        };
        if !(1..=MOST_SIDE).contains(&self.image_size) {
            return refuse("image_size", &format!("1 to {MOST_SIDE}"), self.image_size.to_string());
        }
        if self.mean.iter().any(|mean| !mean.is_finite()) {
            return refuse("mean", "finite", format!("{:?}", self.mean));
        }
        if self.std.iter().any(|&std| !(std > 0.0 && std.is_finite())) {
            return refuse("std", "0 < std < inf", format!("{:?}", self.std));
        }
        if !(0.0..=1.0).contains(&self.flip) {
            return refuse("flip", "0 to 1", self.flip.to_string());
        }
        match self.crop_scale {
            Some([low, high]) if !(0.0 < low && low <= high && high <= 1.0) => {
                refuse("crop_scale", "0 < low <= high <= 1", format!("[{low}, {high}]"))
            }
            _ => Ok(()),
        }
    }

    /// The pixels (3, S, S) of a PNG or JPEG file: the whole of it, resized and normalised. The EXIF rotation is applied,
    /// transparency laid on white.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<Tensor> {
        self.check()?;
        let path = path.as_ref();
        let broken = |error: &dyn std::fmt::Display| {
            LapsError::file("ImageTransform", path, format!("cannot be read: {error}"), EXPECTED)
        };
        let reader = ImageReader::open(path).and_then(ImageReader::with_guessed_format);
        let mut decoder = reader.map_err(|e| broken(&e))?.into_decoder().map_err(|e| broken(&e))?;
        let (width, height) = decoder.dimensions();
        if u64::from(width) * u64::from(height) > MOST_PIXELS {
            return Err(broken(&format!("{width} x {height}, more than {MOST_PIXELS} pixels")));
        }
        let orientation = decoder.orientation().map_err(|e| broken(&e))?;
        let mut image = DynamicImage::from_decoder(decoder).map_err(|e| broken(&e))?;
        image.apply_orientation(orientation);
        self.pixels(&on_white(image)).map_err(|e| broken(&e))
    }

    fn pixels(&self, image: &DynamicImage) -> Result<Tensor> {
        let rgb = image.to_rgb8();
        let (size, refused) = (self.image_size, |error: &dyn std::fmt::Display| {
            LapsError::value("ImageTransform", "image_size", "a size to resize to", error)
        });
        let from = ImageRef::new(rgb.width(), rgb.height(), rgb.as_raw(), PixelType::U8x3);
        let mut to = Image::new(size, size, PixelType::U8x3);
        let algorithm = match self.interpolation {
            // Pillow's bicubic: a = -1/2.
            Interpolation::Bicubic => ResizeAlg::Convolution(FilterType::CatmullRom),
            Interpolation::Bilinear => ResizeAlg::Convolution(FilterType::Bilinear),
            Interpolation::Nearest => ResizeAlg::Nearest,
        };
        let options = ResizeOptions::new().resize_alg(algorithm);
        let from = from.map_err(|e| refused(&e))?;
        // Bicubic overshoot is cut off between the two passes, so their order shows. Pillow 13 begins with the rows unless
        // more than twice as much is to go of the height (found by trying sizes; older ones always begin with the rows).
        let [wide, high, side] = [rgb.width(), rgb.height(), size].map(i64::from);
        let columns_first = high > side && high - side > 2 * (wide - side);
        let (width, height) = if columns_first { (rgb.width(), size) } else { (size, rgb.height()) };
        let mut between = Image::new(width, height, PixelType::U8x3);
        Resizer::new().resize(&from, &mut between, &options).map_err(|e| refused(&e))?;
        Resizer::new().resize(&between, &mut to, &options).map_err(|e| refused(&e))?;
        let mut pixels = Vec::with_capacity(to.buffer().len());
        for channel in 0..3 {
            let (mean, std) = (self.mean[channel] as f32, self.std[channel] as f32);
            pixels.extend(
                to.buffer()[channel..].iter().step_by(3).map(|&x| (f32::from(x) / 255.0 - mean) / std),
            );
        }
        Ok(Tensor::f_from_slice(&pixels)?.f_view([3, i64::from(size), i64::from(size)])?)
    }
}

fn on_white(image: DynamicImage) -> DynamicImage {
    if !image.color().has_alpha() {
        return image;
    }
    let mut white = RgbaImage::from_pixel(image.width(), image.height(), Rgba([255; 4]));
    imageops::overlay(&mut white, &image.to_rgba8(), 0, 0);
    white.into()
}
