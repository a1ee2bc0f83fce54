"""Detection images -> positive and negative samples: plan, cut, report."""
