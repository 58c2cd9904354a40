"""The gate that every artifact passes: compared with the model as trained."""
