//! SPC: the kept patches merged into aggregated tokens, the dropped ones fused into one (laps.md, "semantic-spatial
//! calibration"), by identities 2 and 3: only products with words and lengths are computed, never the tokens.

use pulp::Simd;

use super::options::{Options, Score};
use super::prepare::{EPSILON, Lengths, NOISE, PreparedImage, PreparedText};
use super::real::{Real, lanes};
use super::select::Decision;
use super::simd::{
    Buffer, GatherCoefficients, GatherRows, Strided, combine, dot, reserve, row_products, zeros,
};

/// Where the terms of a sum reach less than this, of rows scaled to about 1, squares may underflow in f32.
const SMALLEST_REACH: f64 = 1e-15;

/// A token computed in f64 from its definition, where the Gram form or the shared exponentials lost too many digits.
pub(crate) struct ExactToken<T: Real> {
    /// Which aggregated token.
    pub slot: usize,
    /// The token, normalised and padded: its terms may be too small for T. Zero where they cancel.
    pub vector: Buffer<T>,
    /// Its weights over [`PairTokens::summed`], in the same scale.
    pub weights: Vec<T>,
    /// What that scale multiplied `E_im = exp(l_im - max l)` with.
    pub scale: f64,
}

/// The tokens of one pair, as far as the alignment and its gradient need them.
///
/// Buffers are kept from pair to pair. Rows of `products` are, in this order: the summed patches (kept ones, then the
/// mean in the soft form), the other patches if asked for, the prefix tokens, the fused token.
pub(crate) struct PairTokens<T: Real> {
    /// Rows of the image that the aggregated tokens sum over: kept patches and, in the soft form, the mean.
    pub summed: Vec<u32>,
    /// The patches that `products` holds besides, in the backward pass of the soft form.
    pub others: Vec<u32>,
    /// P: rows x lanes.
    pub products: Buffer<T>,
    /// D_i E_ij of the summed rows, stride `weight_stride`.
    pub weights: Buffer<T>,
    /// Cosines u_m . w_j of all tokens in order, stride `lanes`.
    pub cosines: Buffer<T>,
    /// Number of tokens of this pair.
    pub count: usize,
    /// Inverse lengths of the aggregated tokens, in the scale of `weights`; 0 for a zero token.
    pub inverse: Vec<T>,
    /// Which aggregated tokens were computed exactly.
    pub exact: Vec<ExactToken<T>>,
    /// G w_m of the summed and other rows, stride `weight_stride`: filled for the gradient of [`Lengths::Gram`] only.
    pub gram_rows: Buffer<T>,
    /// The aggregated tokens, (N_c, stride): filled for [`Lengths::Direct`] only.
    pub vectors: Buffer<T>,
    /// Whether the pair has a fused token.
    pub has_fused: bool,
    /// The fused token in the scale of its weights, and its inverse length there.
    pub fused: Buffer<T>,
    pub fused_inverse: T,
    /// Its weights over the dropped patches.
    pub fused_weights: Vec<T>,
    /// What their scale multiplied `e^{s_i - max s}` with.
    pub fused_scale: f64,
    norms: Buffer<T>,
    reach: Buffer<T>,
    spread: Buffer<T>,
    squares: Buffer<T>,
    partial: Buffer<T>,
}

impl<T: Real> PairTokens<T> {
    pub(crate) fn new() -> Self {
        PairTokens {
            summed: Vec::new(),
            others: Vec::new(),
            products: zeros(0),
            weights: zeros(0),
            cosines: zeros(0),
            count: 0,
            inverse: Vec::new(),
            exact: Vec::new(),
            gram_rows: zeros(0),
            vectors: zeros(0),
            has_fused: false,
            fused: zeros(0),
            fused_inverse: T::zero(),
            fused_weights: Vec::new(),
            fused_scale: 1.0,
            norms: zeros(0),
            reach: zeros(0),
            spread: zeros(0),
            squares: zeros(0),
            partial: zeros(0),
        }
    }

    /// Row of `products` at which the prefix tokens start.
    pub(crate) fn prefix_row(&self) -> usize {
        self.summed.len() + self.others.len()
    }

    /// Computes all of it for one pair; `for_gradient` also what only the backward pass looks at.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn compute<S: Simd>(
        &mut self,
        simd: S,
        image: &PreparedImage<'_, T>,
        text: &PreparedText<T>,
        decision: &Decision<T>,
        options: &Options,
        lengths: Lengths,
        soft: bool,
        for_gradient: bool,
    ) {
        let n = decision.values.len();
        self.summed.clear();
        self.summed.extend_from_slice(&decision.kept);
        if soft {
            self.summed.push(n as u32);
        }
        self.others.clear();
        if for_gradient && soft {
            let absent = (0..n as u32).filter(|&i| decision.values[i as usize] == T::zero());
            self.others.extend(absent);
        }
        self.fuse_dropped(simd, image, text, decision, options, soft);
        self.multiply_words(simd, image, text);
        self.gather_weights(image, decision, soft);
        self.sum_products(simd, image, text);
        self.measure(simd, image, lengths, for_gradient);
        self.normalise(image, text, decision, soft);
    }

    /// r = sum over dropped patches of softmax(s_i) v_i; weights e^{s_i} (1 - D_i), since the denominator cancels.
    #[inline(always)]
    fn fuse_dropped<S: Simd>(
        &mut self,
        simd: S,
        image: &PreparedImage<'_, T>,
        text: &PreparedText<T>,
        decision: &Decision<T>,
        options: &Options,
        soft: bool,
    ) {
        self.has_fused = options.fusion && !decision.dropped.is_empty();
        self.fused_weights.clear();
        self.fused_scale = 1.0;
        if !self.has_fused {
            return;
        }
        let stride = image.stride;
        let dropped = || decision.dropped.iter().map(|&i| i as usize);
        let highest = dropped().fold(T::neg_infinity(), |m, i| m.max(decision.scores[i]));
        self.fused_weights.extend(dropped().map(|i| {
            let weight = (decision.scores[i] - highest).exponential();
            if soft { weight * (T::one() - decision.values[i]) } else { weight }
        }));
        reserve(&mut self.fused, stride);
        let steps = GatherRows { index: &decision.dropped, coefficient: 1, stride };
        // SAFETY: dropped indices are patches, rows of the image; fused holds a row.
        unsafe {
            let out = [self.fused.as_mut_ptr()];
            combine(simd, &[self.fused_weights.as_ptr()], image.rows.as_ptr(), steps, &out, stride, false);
        }
        let square = dot(simd, &self.fused[..stride], &self.fused[..stride]).wide();
        let reach: T = dropped().zip(&self.fused_weights).map(|(i, &f)| f * image.norms[i]).sum();
        // The sum itself loses digits only with the root of what the Gram form would lose.
        let floor = 0.1 * T::GRAM_FLOOR * reach.wide() * reach.wide();
        if square >= floor && reach.wide() > SMALLEST_REACH {
            self.fused_inverse = T::of(1.0 / square.sqrt());
        } else {
            self.fuse_exactly(image, text, decision, options, soft);
        }
    }

    #[cold]
    fn fuse_exactly(
        &mut self,
        image: &PreparedImage<'_, T>,
        text: &PreparedText<T>,
        decision: &Decision<T>,
        options: &Options,
        soft: bool,
    ) {
        let row = |i: u32| &image.rows[i as usize * image.stride..][..image.stride];
        let wide = |x: &[T], y: &[T]| x.iter().zip(y).map(|(x, y)| x.wide() * y.wide()).sum::<f64>();
        let score = |i: u32| {
            let norm = wide(row(i), row(i)).sqrt();
            if soft || options.score == Score::Dot || norm == 0.0 {
                return decision.scores[i as usize].wide();
            }
            let context = if options.language_context { wide(row(i), &text.direction) } else { 0.0 };
            (wide(row(i), &image.direction) + context) / norm
        };
        let scores: Vec<f64> = decision.dropped.iter().map(|&i| score(i)).collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (mut sum, mut reach) = (vec![0.0; image.stride], 0.0);
        let mut weights = Vec::with_capacity(scores.len());
        for (&i, s) in decision.dropped.iter().zip(scores) {
            let open = if soft { 1.0 - decision.values[i as usize].wide() } else { 1.0 };
            let weight = (s - highest).exp() * open;
            weights.push(weight);
            reach += weight * image.norms[i as usize].wide();
            sum.iter_mut().zip(row(i)).for_each(|(r, v)| *r += weight * v.wide());
        }
        let scale = unit_sum(&sum, reach, &mut self.fused);
        self.fused_weights.clear();
        self.fused_weights.extend(weights.iter().map(|w| T::saturating(w * scale)));
        self.fused_inverse = if scale > 0.0 { T::one() } else { T::zero() };
        self.fused_scale = scale;
    }

    /// P = V W^T for the rows listed in the type's comment.
    #[inline(always)]
    fn multiply_words<S: Simd>(&mut self, simd: S, image: &PreparedImage<'_, T>, text: &PreparedText<T>) {
        let stride = image.stride;
        let prefix = image.prefix_inverse.len();
        let first_prefix = image.norms.len();
        let rows = self.prefix_row() + prefix + usize::from(self.has_fused);
        reserve(&mut self.products, rows * text.lanes);
        let base = image.rows.as_ptr();
        // SAFETY: all indices are rows of the image; its rows and the words have `stride` elements, zero beyond C.
        unsafe {
            let indices = self.summed.iter().chain(&self.others).map(|&i| i as usize);
            let mut from: Vec<*const T> =
                indices.chain(first_prefix..first_prefix + prefix).map(|i| base.add(i * stride)).collect();
            if self.has_fused {
                from.push(self.fused.as_ptr());
            }
            let out = self.products.as_mut_ptr();
            let to: Vec<*mut T> = (0..rows).map(|r| out.add(r * text.lanes)).collect();
            row_products(simd, &from, text.rows.as_ptr(), text.length, stride, &to);
        }
    }

    /// The weights of the summed rows, made contiguous.
    #[inline(always)]
    fn gather_weights(&mut self, image: &PreparedImage<'_, T>, decision: &Decision<T>, soft: bool) {
        let stride = image.weight_stride;
        reserve(&mut self.weights, self.summed.len() * stride);
        reserve(&mut self.norms, self.summed.len());
        for (s, &i) in self.summed.iter().enumerate() {
            let i = i as usize;
            let to = &mut self.weights[s * stride..][..stride];
            to.copy_from_slice(&image.weights[i * stride..][..stride]);
            if soft && i < decision.values.len() && decision.values[i] != T::one() {
                to.iter_mut().for_each(|w| *w *= decision.values[i]);
            }
            self.norms[s] = image.norms[i];
        }
    }

    /// Numerators sum_i E_ij P_i of the aggregated tokens; what their lengths could reach, sum_i E_ij |v_i|; and what the
    /// squares would be of orthogonal patches, sum_i (E_ij |v_i|)^2.
    #[inline(always)]
    fn sum_products<S: Simd>(&mut self, simd: S, image: &PreparedImage<'_, T>, text: &PreparedText<T>) {
        let (prefix, aggregated) = (image.prefix_inverse.len(), image.logits.dim().1);
        let (stride, count) = (image.weight_stride, self.summed.len());
        reserve(&mut self.cosines, (prefix + aggregated + 1) * text.lanes);
        let width = text.length.next_multiple_of(lanes::<S, T>());
        // SAFETY: weights has `count` rows of `stride`, products at least `count` rows of `lanes`, cosines a row per
        // token.
        unsafe {
            let weights = self.weights.as_ptr();
            let from: Vec<*const T> = (0..aggregated).map(|m| weights.add(m)).collect();
            let out = self.cosines.as_mut_ptr();
            let to: Vec<*mut T> = (0..aggregated).map(|m| out.add((prefix + m) * text.lanes)).collect();
            let steps = Strided { count, coefficient: stride, row: text.lanes };
            combine(simd, &from, self.products.as_ptr(), steps, &to, width, false);
        }
        reserve(&mut self.reach, stride);
        reserve(&mut self.spread, stride);
        self.reach[..stride].fill(T::zero());
        self.spread[..stride].fill(T::zero());
        for (row, &norm) in self.weights.chunks_exact(stride).zip(&self.norms[..count]) {
            let sums = self.reach.iter_mut().zip(self.spread.iter_mut());
            for (&w, (reach, spread)) in row.iter().zip(sums) {
                *reach += w * norm;
                *spread += w * norm * (w * norm);
            }
        }
    }

    /// Squared lengths of the aggregated tokens.
    #[inline(always)]
    fn measure<S: Simd>(
        &mut self,
        simd: S,
        image: &PreparedImage<'_, T>,
        lengths: Lengths,
        for_gradient: bool,
    ) {
        let (aggregated, stride) = (image.logits.dim().1, image.weight_stride);
        reserve(&mut self.squares, stride);
        match lengths {
            Lengths::Direct => {
                let row = image.stride;
                reserve(&mut self.vectors, aggregated * row);
                // SAFETY: weights has a row per summed row, whose indices are rows of the image; vectors N_c rows.
                unsafe {
                    let weights = self.weights.as_ptr();
                    let from: Vec<*const T> = (0..aggregated).map(|m| weights.add(m)).collect();
                    let out = self.vectors.as_mut_ptr();
                    let to: Vec<*mut T> = (0..aggregated).map(|m| out.add(m * row)).collect();
                    let steps = GatherRows { index: &self.summed, coefficient: stride, stride: row };
                    combine(simd, &from, image.rows.as_ptr(), steps, &to, row, false);
                }
                for m in 0..aggregated {
                    let token = &self.vectors[m * row..][..row];
                    self.squares[m] = dot(simd, token, token);
                }
            }
            Lengths::Gram if for_gradient => {
                let rows = self.summed.len() + self.others.len();
                reserve(&mut self.gram_rows, rows * stride);
                let width = aggregated.next_multiple_of(lanes::<S, T>());
                // SAFETY: summed and other indices are rows of G, summed ones also columns; weights has a row for each of
                // those, gram_rows one for each of all.
                unsafe {
                    let gram = image.gram.as_ptr();
                    let indices = self.summed.iter().chain(&self.others).map(|&i| i as usize);
                    let from: Vec<*const T> = indices.map(|i| gram.add(i * image.gram_stride)).collect();
                    let out = self.gram_rows.as_mut_ptr();
                    let to: Vec<*mut T> = (0..rows).map(|r| out.add(r * stride)).collect();
                    let steps = GatherCoefficients { index: &self.summed, row: stride };
                    combine(simd, &from, self.weights.as_ptr(), steps, &to, width, false);
                }
                self.squares[..stride].fill(T::zero());
                let rows = self.weights.chunks_exact(stride).zip(self.gram_rows.chunks_exact(stride));
                for (e, y) in rows.take(self.summed.len()) {
                    let squares = self.squares[..stride].iter_mut();
                    squares.zip(e).zip(y).for_each(|((q, &e), &y)| *q += e * y);
                }
            }
            Lengths::Gram => {
                self.squares[..stride].fill(T::zero());
                // e^T G e by the lower triangle: rows below a block count twice, the block itself once.
                const BLOCK: usize = 8;
                reserve(&mut self.partial, BLOCK * stride);
                let width = aggregated.next_multiple_of(lanes::<S, T>());
                for start in (0..self.summed.len()).step_by(BLOCK) {
                    let end = (start + BLOCK).min(self.summed.len());
                    // SAFETY: summed indices are rows and columns of G; weights has a row for each.
                    unsafe {
                        let gram = image.gram.as_ptr();
                        let mut from = [gram; BLOCK];
                        let mut to = [self.partial.as_mut_ptr(); BLOCK];
                        for (b, &i) in self.summed[start..end].iter().enumerate() {
                            from[b] = gram.add(i as usize * image.gram_stride);
                            to[b] = to[b].add(b * stride);
                        }
                        let (from, to) = (&from[..end - start], &to[..end - start]);
                        let below = GatherCoefficients { index: &self.summed[..start], row: stride };
                        combine(simd, from, self.weights.as_ptr(), below, to, width, false);
                        self.partial[..(end - start) * stride].iter_mut().for_each(|y| *y += *y);
                        let inside = GatherCoefficients { index: &self.summed[start..end], row: stride };
                        let weights = self.weights.as_ptr().add(start * stride);
                        combine(simd, from, weights, inside, to, width, true);
                    }
                    for b in 0..end - start {
                        let y = &self.partial[b * stride..][..stride];
                        let e = &self.weights[(start + b) * stride..][..stride];
                        let squares = self.squares[..stride].iter_mut();
                        squares.zip(e).zip(y).for_each(|((q, &e), &y)| *q += e * y);
                    }
                }
            }
        }
    }

    /// Cosines of all tokens: aggregated, prefix, fused.
    #[inline(always)]
    fn normalise(
        &mut self,
        image: &PreparedImage<'_, T>,
        text: &PreparedText<T>,
        decision: &Decision<T>,
        soft: bool,
    ) {
        let (prefix, aggregated) = (image.prefix_inverse.len(), image.logits.dim().1);
        let lanes = text.lanes;
        self.count = prefix + aggregated + usize::from(self.has_fused);
        self.inverse.clear();
        self.exact.clear();
        let (floor, low_floor) = (T::of(T::GRAM_FLOOR), T::of(0.1 * T::GRAM_FLOOR));
        let half = T::of(0.5);
        for m in 0..aggregated {
            let (square, reach) = (self.squares[m], self.reach[m]);
            // Many patches in all directions shrink the square too, yet little cancels: theirs is near the spread.
            let floor = if square >= half * self.spread[m] { low_floor } else { floor };
            // Rows are scaled to about 1, so a small reach means that the weights have underflown.
            if square >= floor * reach * reach && reach > T::of(SMALLEST_REACH) {
                self.inverse.push(square.sqrt().recip());
            } else {
                let token = self.exact_token(image, decision, m, soft);
                let cosines = &mut self.cosines[(prefix + m) * lanes..][..lanes];
                for (j, x) in cosines.iter_mut().enumerate().take(text.length) {
                    let word = &text.rows[j * image.stride..][..image.stride];
                    let product: f64 = token.vector.iter().zip(word).map(|(a, b)| a.wide() * b.wide()).sum();
                    *x = T::of(product);
                }
                self.exact.push(token);
            }
            let inverse = self.inverse[m];
            self.cosines[(prefix + m) * lanes..][..lanes].iter_mut().for_each(|x| *x *= inverse);
        }
        let first = self.prefix_row() * lanes;
        self.cosines[..prefix * lanes].copy_from_slice(&self.products[first..][..prefix * lanes]);
        if self.has_fused {
            let from = &self.products[first + prefix * lanes..][..lanes];
            let to = &mut self.cosines[(self.count - 1) * lanes..][..lanes];
            to.iter_mut().zip(from).for_each(|(t, &p)| *t = p * self.fused_inverse);
        }
    }

    #[cold]
    fn exact_token(
        &mut self,
        image: &PreparedImage<'_, T>,
        decision: &Decision<T>,
        m: usize,
        soft: bool,
    ) -> ExactToken<T> {
        let n = decision.values.len();
        let logit = |i: u32| image.logits[[i as usize, m]].wide();
        // The stable form fixes the maximum over all patches; the hard one may take that of the kept ones.
        let highest = if soft {
            (0..n as u32).map(logit).fold(f64::NEG_INFINITY, f64::max)
        } else {
            self.summed.iter().map(|&i| logit(i)).fold(f64::NEG_INFINITY, f64::max)
        };
        let (mut sum, mut reach) = (vec![0.0; image.stride], 0.0);
        let mut weights = Vec::with_capacity(self.summed.len());
        for &i in &self.summed {
            let weight = match i as usize {
                i if i == n => EPSILON,
                i if soft => (logit(i as u32) - highest).exp() * decision.values[i].wide(),
                i => (logit(i as u32) - highest).exp(),
            };
            weights.push(weight);
            reach += weight * image.norms[i as usize].wide();
            let row = &image.rows[i as usize * image.stride..][..image.stride];
            sum.iter_mut().zip(row).for_each(|(q, v)| *q += weight * v.wide());
        }
        let mut vector = zeros(image.stride);
        let scale = unit_sum(&sum, reach, &mut vector);
        self.inverse.push(if scale > 0.0 { T::one() } else { T::zero() });
        let weights = weights.iter().map(|w| T::saturating(w * scale)).collect();
        ExactToken { slot: m, vector, weights, scale }
    }
}

/// Normalises `sum` into `out` and returns its inverse length; zeros where it is but the noise of terms of length
/// `reach`. All of it in f64: sums of small terms are too short for f32, and their inverse lengths too long.
fn unit_sum<T: Real>(sum: &[f64], reach: f64, out: &mut [T]) -> f64 {
    // A second scale, so that squares of the shortest f64 do not underflow either.
    let largest = sum.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let length = largest * sum.iter().map(|x| (x / largest) * (x / largest)).sum::<f64>().sqrt();
    let inverse = if length > NOISE * reach && length > f64::MIN_POSITIVE { 1.0 / length } else { 0.0 };
    out.iter_mut().zip(sum).for_each(|(o, &x)| *o = T::of(x * inverse));
    inverse
}
