//! Python's `random.Random(seed).sample`, so that examples drawn by a seed are those that
//! lm-evaluation-harness draws.
//!
//! The generator is MT19937 (Matsumoto and Nishimura 1998), seeded by `init_by_array([seed])`;
//! `sample` draws indices below `n` as the top bits of a word, again while they are too large or
//! taken already. (Where `n` is small Python shuffles a list instead; that branch is here too.)

const N: usize = 624;

pub struct Random {
    state: [u32; N],
    at: usize,
}

impl Random {
    pub fn new(seed: u32) -> Self {
        let mut s = [0u32; N];
        s[0] = 19_650_218;
        for i in 1..N {
            let x = s[i - 1] ^ (s[i - 1] >> 30);
            s[i] = x.wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        let mut i = 1;
        for _ in 0..N {
            let x = s[i - 1] ^ (s[i - 1] >> 30);
            s[i] = (s[i] ^ x.wrapping_mul(1_664_525)).wrapping_add(seed);
            i += 1;
            if i == N {
                s[0] = s[N - 1];
                i = 1;
            }
        }
        for _ in 0..N - 1 {
            let x = s[i - 1] ^ (s[i - 1] >> 30);
            s[i] = (s[i] ^ x.wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i == N {
                s[0] = s[N - 1];
                i = 1;
            }
        }
        s[0] = 0x8000_0000;
        Self { state: s, at: N }
    }

    fn word(&mut self) -> u32 {
        if self.at == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % N] ^ (y >> 1) ^ twist;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A number below `n`, which is at least 1 and fits 32 bits.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let r = (self.word() >> (32 - bits)) as usize;
            if r < n {
                return r;
            }
        }
    }

    /// `k` different numbers below `n`, in the order drawn; all of them if `k` is more.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let k = k.min(n);
        let mut set = 21;
        if k > 5 {
            set += 4usize.pow((3.0 * k as f64).log(4.0).ceil() as u32);
        }
        if n <= set {
            let mut pool: Vec<usize> = (0..n).collect();
            return (0..k)
                .map(|i| {
                    let j = self.below(n - i);
                    let drawn = pool[j];
                    pool[j] = pool[n - i - 1];
                    drawn
                })
                .collect();
        }
        let mut drawn: Vec<usize> = Vec::with_capacity(k);
        while drawn.len() < k {
            let j = self.below(n);
            if !drawn.contains(&j) {
                drawn.push(j);
            }
        }
        drawn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_python_draws() {
        // r = random.Random(1234); r.sample(range(7473), 5); r.sample(range(7473), 5);
        // r.sample(range(20), 5); r.sample(range(100), 8)
        let mut r = Random::new(1234);
        assert_eq!(r.sample(7473, 5), [6374, 3610, 957, 61, 742]);
        assert_eq!(r.sample(7473, 5), [7462, 6610, 4769, 286, 5501]);
        assert_eq!(r.sample(20, 5), [2, 3, 11, 7, 0]);
        assert_eq!(r.sample(100, 8), [3, 2, 44, 82, 79, 61, 78, 59]);
        assert_eq!(r.sample(3, 9).len(), 3);
    }
}
