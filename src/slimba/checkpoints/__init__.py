"""Reading and writing models: transformers directories, mamba_ssm directories, our packed directory."""
