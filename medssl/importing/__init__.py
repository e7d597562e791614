"""Published weights of other projects into our encoders: `medssl.importing.write.import_weights(file, encoder, out)`."""
