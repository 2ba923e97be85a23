//! Hot loops of demur: matrix products, attention, norms, top-k, with a scalar reference for each.

