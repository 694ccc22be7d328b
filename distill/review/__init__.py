"""Where student and teacher disagree: found, shown to human reviewers, and their decisions read back."""
