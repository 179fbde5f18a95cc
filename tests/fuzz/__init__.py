"""Every reader against inputs that nobody meant: targets, mutations, a driver, and what it found before (corpus/)."""
