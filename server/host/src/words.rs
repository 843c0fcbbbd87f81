//! Mapped words.
