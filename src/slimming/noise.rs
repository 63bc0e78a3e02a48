//! Counter-based noise: a pure function of (seed, image, caption, patch), so that it need not be stored.

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn absorb(h: u64, index: usize) -> u64 {
    mix(h.wrapping_add((index as u64).wrapping_add(1).wrapping_mul(GOLDEN)))
}

/// The noise of one image x caption pair.
#[derive(Clone, Copy)]
pub(crate) struct PairNoise(u64);

impl PairNoise {
    pub(crate) fn new(seed: u64, image: usize, caption: usize) -> Self {
        PairNoise(absorb(absorb(mix(seed.wrapping_add(GOLDEN)), image), caption))
    }

    /// Logistic noise, the difference of the two Gumbel draws of eq. 4, for one patch.
    pub(crate) fn logistic(self, patch: usize) -> f64 {
        // The upper 53 bits, centred, so that neither 0 nor 1 comes up.
        let u = ((absorb(self.0, patch) >> 11) as f64 + 0.5) * 2f64.powi(-53);
        u.ln() - (-u).ln_1p()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_has_the_moments_of_a_logistic_variable() {
        let draws: Vec<f64> =
            (0..20_000).map(|i| PairNoise::new(7, i % 13, i / 13 % 11).logistic(i)).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        // Standard error of the mean is 1.81 / sqrt(20000) = 0.013.
        assert!(mean.abs() < 0.06, "mean {mean}");
        assert!((variance - std::f64::consts::PI.powi(2) / 3.0).abs() < 0.2, "variance {variance}");
    }
}
