"""Exports: `medssl.export.write.export_weights(weights, to, out)`."""
