"""Programs that are broken on purpose: each as the field has met it, with the public report."""
