//! The front half: filled in by its own files.
