//! fs-layer: a shared-disk filesystem on a blockd volume. Nothing of it is built yet; see the README for what is.
