"""Whether distillation paid: tasks, metrics, reports, and the comparison of two of them."""
