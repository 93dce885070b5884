"""The tiny models: small trained models of real architectures, and the rendered world they are trained on."""
