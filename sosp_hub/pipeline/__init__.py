"""Recipe to result, stage by stage; what is done is kept, so that the same command continues."""
