"""Data for supervised fine-tuning: files and folders to conversations with pictures.

Must not know processors or tokens. Needs no transformers; Parquet and folders need `datasets`.

Read: example, forms, pictures, read.
"""
