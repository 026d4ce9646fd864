"""The room `local`: all of Millstream on one machine with nothing to install. `python -m local up` or `demo`."""
