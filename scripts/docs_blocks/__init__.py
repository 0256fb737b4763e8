"""What `update_docs.py` writes into the pages: a module for each subject."""
