//! Dense f32 products over the `gemm` crate (AVX-512, AVX2+FMA, NEON, portable, chosen at run time).

/// A strided view of an `rows x cols` matrix.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// The values.
    pub data: &'a [f32],
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix with `cols` columns.
    pub fn row_major(data: &'a [f32], cols: usize) -> Self {
        Self {
            data,
            row_stride: cols,
            col_stride: 1,
        }
    }

    /// The transpose of a row-major matrix that has `cols` columns as stored.
    pub fn transposed(data: &'a [f32], cols: usize) -> Self {
        Self {
            data,
            row_stride: 1,
            col_stride: cols,
        }
    }

    fn holds(&self, rows: usize, cols: usize) -> bool {
        rows == 0
            || cols == 0
            || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.data.len()
    }
}

/// `c = a b`, or `c += a b` with `accumulate`.
///
/// # Shapes
/// `a` is `[m, k]`, `b` is `[k, n]`, `c` is `[m, n]` row-major.
///
/// # Panics
/// If a view is too small for its shape.
pub fn matmul(
    m: usize,
    n: usize,
    k: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    accumulate: bool,
) {
    matmul_with(m, n, k, a, b, c, n, accumulate, crate::threads());
}

/// As [`matmul`], with a row stride for `c` and the number of threads to use.
///
/// # Panics
/// If a view is too small for its shape.
pub fn matmul_with(
    m: usize,
    n: usize,
    k: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    c_row_stride: usize,
    accumulate: bool,
    threads: usize,
) {
    assert!(
        a.holds(m, k) && b.holds(k, n),
        "an operand is smaller than its shape"
    );
    assert!(
        m == 0 || n == 0 || (m - 1) * c_row_stride + n <= c.len(),
        "c is too small"
    );
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = if threads > 1 {
        ::gemm::Parallelism::Rayon(threads)
    } else {
        ::gemm::Parallelism::None
    };
    // SAFETY: the assertions above bound every element that is read or written; `c` is borrowed
    // exclusively, so it overlaps neither operand.
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_by_hand() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // [2, 3]
        let b = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]; // [3, 2]
        let mut c = [10.0; 4];
        matmul(
            2,
            2,
            3,
            Matrix::row_major(&a, 3),
            Matrix::row_major(&b, 2),
            &mut c,
            false,
        );
        assert_eq!(c, [4.0, 5.0, 10.0, 11.0]);
        matmul(
            2,
            2,
            3,
            Matrix::row_major(&a, 3),
            Matrix::row_major(&b, 2),
            &mut c,
            true,
        );
        assert_eq!(c, [8.0, 10.0, 20.0, 22.0]);
        // a aᵀ
        matmul(
            2,
            2,
            3,
            Matrix::row_major(&a, 3),
            Matrix::transposed(&a, 3),
            &mut c,
            false,
        );
        assert_eq!(c, [14.0, 32.0, 32.0, 77.0]);
    }
}
