"""Speed, measured beside what one would write by hand: candidates, parity, clocks, and suites of them as YAML."""
