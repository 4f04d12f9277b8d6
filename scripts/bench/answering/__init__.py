"""Parts of the tables of language models (``language.py``): their runs, the cells that are kept of them, and what the tables say."""
