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
    "io_retry": "the storage failed three times; running again retries it",
    "timeout": "took longer than the limit and was left behind; running again retries it",
    "arriving": "changed a moment ago; the next run takes it",
    "worker_lost": "the process that read it died; running again retries it",
    "withdrawn": "withdrawn from the archive",
    "unsupported_vendor": "a vendor's own format that has no reader",
    "container": "a zip, tar or gzip file; its members have rows of their own",
    "container_limit": "a member that unpacks to more than any image does",
    "encrypted": "encrypted; unpack it with its password first",
    "no_decoder": "no decoder is installed for it",
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
    "multiframe": "several frames where the reader takes one, or multi-frame DICOM that says nothing of its frames",
    "mosaic": "a Siemens mosaic whose header does not say how it is tiled",
    "localiser": "a localiser",
    "screenshot": "a screenshot or report page",
    "derived_map": "a map computed from other images",
    "label_image": "the label or overview of a slide, which may show a name",
    "report": "a structured report",
    "no_domain": "a modality that has no domain yet",
    "not_hu": "CT values that are not Hounsfield units",
    "photometric": "a photometric interpretation other than MONOCHROME2",
    "unsupported_pixels": "a pixel layout that has no reader yet",
    "too_large": "a slide too large to be read whole; it is read in tiles",
    "empty_tissue": "a slide on which no tissue was found",
    "no_tissue": "ultrasound without a two-dimensional tissue image",
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
    "worker_lost": FILE_REASONS["worker_lost"],
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
    "age_conflict": "age and dates disagree, or the age says nothing that can be",
    "date_invalid": "a date that cannot be",
    "split_by_block": "one series of the source holds several stacks of different slice steps",
    "tilt_corrected": "a sheared stack (gantry tilt) was moved slice by slice onto an orthogonal grid",
    "gaps_filled": "missing slices became invalid planes",
    "slices_resampled": "slices of slightly uneven steps were interpolated onto even ones",
    "mpp_missing": "a slide that does not state micrometres per pixel",
    "mpp_estimated": "micrometres per pixel were estimated from the objective",
    "mpp_user": "micrometres per pixel were given by the user",
    "single_level": "a slide without a pyramid, slow at coarse resolutions",
    "frame_time_conflict": "sources of the frame time differ by more than a tenth",
    "frame_time_unknown": "a clip without any frame time",
    "colour_doppler": "colour Doppler was found in the tissue image",
    "region_outside": "ultrasound regions reach beyond the image and were not used",
    "channels_assumed": "images of one file whose meaning it does not state were taken for channels",
    "multi_page": "a TIFF of several pages",
    "sidecar_conflict": "a converter's JSON file contradicts the file beside it, or the modality that was given",
    **{
        f"varying_{name}": f"{name.replace('_', ' ')} differs within one volume although nothing else does"
        for name in (
            "echo_number",
            "temporal_position",
            "b_value",
            "image_type",
            "trigger_time",
            "echo_time",
            "inversion_time",
            "acquisition_number",
            "repetition_time",
            "flip_angle",
            "kvp",
            "kernel",
            "slice_thickness",
            "patient_position",
        )
    },
}
"""Quality flags."""

PRIVACY_FLAGS: dict[str, str] = {
    "burned_in_stated": "BurnedInAnnotation says YES",
    "burned_in_suspected": "text was found in the pixels",
    "face_possible": "a head CT or MR may show the face",
    "label_image": "a slide's label or overview image may show a name",
    "overlay": "overlay planes (60xx) were present and excluded",
    "private_tags": "private elements, which may hold names, in the files",
    "screenshot": "secondary captures often show names",
}
"""Privacy flags: why somebody should look before pixels leave."""
