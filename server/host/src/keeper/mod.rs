//! To be filled by its own files.
