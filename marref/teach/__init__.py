"""Teaching: exercises that grade themselves, and a decoder to watch."""
