"""Programs compiled for TPUs that are not there: memory, work and traffic, read from what the compiler made."""
