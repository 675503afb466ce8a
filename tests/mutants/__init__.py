"""`make mutants`: a seeded sample of small faults in the mathematics; the tests of a fault's module should notice it.

Outcomes are kept in .mutants/outcomes.jsonl by the text of the changed file, so that an interrupted run goes on and an
edited file starts anew; docs/mutants.md is written from them. A survivor is a hole in the tests, or changes nothing.

Why no tool of PyPI: cosmic-ray starts Python and torch anew for every mutant and writes into the working tree; mutmut 3
takes no sample, and runs every test that passes through a function, minutes for a sweep. Here a child is forked with
torch imported, imports the package with one module changed, and runs the tests chosen for that module.
"""
