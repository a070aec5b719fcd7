"""The weights that read a cut axis, solved again from calibration inputs."""
