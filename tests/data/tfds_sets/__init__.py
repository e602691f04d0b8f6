"""TFDS data sets made by the tests; TFDS wants each builder in a module inside a package."""
