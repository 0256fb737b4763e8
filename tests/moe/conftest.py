"""Its presence puts this folder on the import path, so that tests in the folders below import masked_twin."""
