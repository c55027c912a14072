"""The scripts at the root, and the commands of `fledge`: each module is one stage with its `main`."""
