"""What the notebooks do, one module a question; built on the library, told by the figures."""
