//! How many addresses a file is given at a time.
