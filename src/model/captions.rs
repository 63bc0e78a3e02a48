//! Captions to token ids, by the tokenizer.json that lies with a model.

use std::path::Path;

use tch::Tensor;
use tokenizers::Tokenizer;

use super::Result;
use crate::error::LapsError;

const OPERATION: &str = "CaptionTokenizer";

/// Token ids of captions, the same as the Python package gives them.
#[derive(Debug)]
pub struct CaptionTokenizer {
    /// The file, as it is kept with a model.
    pub(super) json: String,
    tokenizer: Tokenizer,
    start: u32,
    end: u32,
    padding: u32,
    max_length: usize,
}

impl CaptionTokenizer {
    /// Of a `tokenizer.json`. `max_length` is the most tokens of a caption, start and end included; what the file says may
    /// be less.
    pub fn from_file(file: impl AsRef<Path>, max_length: usize) -> Result<Self> {
        let file = file.as_ref();
        let broken = |problem: String| LapsError::file(OPERATION, file, problem, "a tokenizer.json");
        let json =
            std::fs::read_to_string(file).map_err(|error| broken(format!("cannot be read: {error}")))?;
        let mut tokenizer: Tokenizer =
            json.parse().map_err(|error| broken(format!("cannot be used: {error}")))?;
        let max_length = tokenizer.get_truncation().map_or(max_length, |t| t.max_length.min(max_length));
        let stated = tokenizer.get_padding().map(|padding| padding.pad_id);
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| broken(format!("cannot be used: {error}")))?;
        let frame = tokenizer.encode("", true).map_err(|error| broken(format!("cannot be used: {error}")))?;
        let &[start, end] = frame.get_ids() else {
            return Err(broken("does not put one token before a text and one after".to_owned()));
        };
        if max_length < 3 {
            return Err(LapsError::value(OPERATION, "max_length", "at least 3", max_length));
        }
        let named = ["[PAD]", "<pad>"].iter().find_map(|token| tokenizer.token_to_id(token));
        let padding = stated.or(named).unwrap_or(end);
        Ok(CaptionTokenizer { json, tokenizer, start, end, padding, max_length })
    }

    /// The number of ids.
    pub fn vocab_size(&self) -> i64 {
        self.tokenizer.get_vocab_size(true) as i64
    }

    /// Ids (B_t, L), padded to the longest, and lengths (B_t,), both int64. Longer captions are cut.
    pub fn encode<S: AsRef<str>>(&self, captions: &[S]) -> Result<(Tensor, Tensor)> {
        if captions.is_empty() {
            return Err(LapsError::value(OPERATION, "captions", "at least one", 0));
        }
        let mut rows: Vec<Vec<i64>> = Vec::with_capacity(captions.len());
        for (index, caption) in captions.iter().enumerate() {
            let encoding = self
                .tokenizer
                .encode(caption.as_ref(), false)
                .map_err(|error| LapsError::value(OPERATION, "captions", "text", error))?;
            let ids = encoding.get_ids();
            if ids.is_empty() {
                let got = format!("{:?} at {index}", caption.as_ref());
                return Err(LapsError::value(OPERATION, "captions", "at least one word each", got));
            }
            let own = &ids[..ids.len().min(self.max_length - 2)];
            let framed = [&[self.start], own, &[self.end]].concat();
            rows.push(framed.into_iter().map(i64::from).collect());
        }
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        let lengths: Vec<i64> = rows.iter().map(|row| row.len() as i64).collect();
        for row in &mut rows {
            row.resize(longest, i64::from(self.padding));
        }
        let ids = Tensor::f_from_slice(&rows.concat())?.f_view([rows.len() as i64, longest as i64])?;
        Ok((ids, Tensor::f_from_slice(&lengths)?))
    }
}
