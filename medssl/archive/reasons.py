"""The closed vocabularies of the index: why a file or a series is not used, and what is odd about one that is."""

from __future__ import annotations

FILE_REASONS: dict[str, str] = {
    "not_image": "not an image file, or a DICOM object without pixels",
    "unsupported_format": "an image format that has no reader yet",
    "unreadable": "recognised, but its header cannot be parsed",
    "truncated": "shorter than its header promises",
    "empty": "zero bytes",
    "permission": "no permission to read the file or folder",
    "vanished": "gone between listing and reading",
    "broken_link": "a symbolic link to nothing",
    "linked_folder": "a symbolic link to a folder; links to folders are not followed",
    "io_error": "the operating system could not read it",
    "withdrawn": "withdrawn from the archive",
    "sidecar": "a converter's JSON file, read for its modality",
    "duplicate": "the same bytes as a file that is used",
}
"""Reasons of single files."""

SERIES_REASONS: dict[str, str] = {
    "not_3d": "not a three-dimensional volume",
    "not_scalar": "colour or vector voxels",
    "no_spacing": "voxel spacing is missing or zero",
    "no_position": "slices without position or orientation",
    "bad_orientation": "slice or axis directions are not perpendicular",
    "gantry_tilt": "slices are sheared against their normal",
    "irregular_slices": "slice gaps differ",
    "collision": "several slices at one position that no tag separates",
    "single_slice": "one slice only",
    "no_decoder": "no decoder for its compression is installed",
    "multiframe": "multi-frame DICOM has no reader yet",
    "mosaic": "Siemens mosaic has no reader yet",
    "localiser": "a localiser",
    "screenshot": "a screenshot or report page",
    "derived_map": "a map computed from other images",
    "no_domain": "a modality that has no domain yet",
    "not_hu": "CT values that are not Hounsfield units",
    "photometric": "a photometric interpretation other than MONOCHROME2",
    "unsupported_pixels": "a pixel layout that has no reader yet",
}
"""Reasons of series, and so of all their files."""

IMAGE_REASONS: dict[str, str] = {
    "constant": "all voxels have one value",
    "no_finite_voxels": "no finite, non-padding voxel",
    "unreadable": FILE_REASONS["unreadable"],
    "truncated": FILE_REASONS["truncated"],
    "geometry": "slices or grids that do not fit together",
    "vanished": FILE_REASONS["vanished"],
    "permission": FILE_REASONS["permission"],
    "empty": FILE_REASONS["empty"],
    "io_error": FILE_REASONS["io_error"],
    "not_image": FILE_REASONS["not_image"],
    "unsupported_format": FILE_REASONS["unsupported_format"],
    "worker_lost": "the process that read it died; running again retries it",
    **SERIES_REASONS,
}
"""Reasons with which reading an image can fail."""

FLAGS: dict[str, str] = {
    "nan_voxels": "NaN or infinite voxels were excluded",
    "padding": "padding voxels were excluded",
    "float32_rounded": "values were rounded to float32",
    "orientation_unknown": "the file states no orientation",
    "units_converted": "spacing was given in another unit than mm",
    "hu_assumed": "the format cannot say that values are Hounsfield units",
    "derived": "ImageType says DERIVED without naming a map",
    "split_by_tag": "one series of the source holds several volumes, told apart by a tag",
    "split_by_visit": "one series of the source holds several volumes, told apart by order at each position",
    "temporal_mismatch": "the number of volumes differs from the number of temporal positions stated",
    "uid_conflict": "one instance UID on files with different content",
    "patient_unknown": "no usable patient identity",
    "lossy": "lossy compression",
    "patient_shared": "one patient identity on people who differ",
}
"""Quality flags."""

PRIVACY_FLAGS: dict[str, str] = {
    "burned_in_stated": "BurnedInAnnotation says YES",
    "burned_in_suspected": "text was found in the pixels",
    "face_possible": "a head CT or MR may show the face",
    "label_image": "a slide's label or overview image may show a name",
    "overlay": "overlay planes (60xx) were present and excluded",
    "private_tags": "private elements with text",
    "screenshot": "secondary captures often show names",
}
"""Privacy flags: why somebody should look before pixels leave."""
