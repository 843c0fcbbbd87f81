//! The core half: filled in by its own files.
