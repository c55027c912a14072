"""Base against instruct: metrics and how sure one can be of them, judges, and the report."""
