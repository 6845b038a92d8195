"""Post-training quantisation of chosen rows by GPTQ or to the nearest; what is not chosen stays as it is."""
