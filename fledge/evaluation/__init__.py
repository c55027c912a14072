"""Base against instruct: metrics with confidence intervals, judges, and the report."""
