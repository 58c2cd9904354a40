"""What is learnt from: files -> rows -> conversations -> tokens and labels -> batches."""
