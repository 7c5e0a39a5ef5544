"""Which tests ``make test`` leaves to ``make test-all``, and which files begin first.

``make test`` tests a promise by fewer cases, or by one test of several.

Cases of a function that are not run get the marker ``slow``. The number counts the cases that stay, spread evenly over
the parameters; the entry with the longest name decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

# test file or function, below tests/ -> cases of each function that make test runs
CASES = {
    # flows: one server and worker, one cache, one student
    "flows/test_devices.py": 0,
    "flows/test_service.py::test_stopped_in_the_middle_it_goes_on_where_it_was": 0,
    "flows/test_service.py::test_a_port_that_is_taken_is_named": 0,
    "flows/test_student_flows.py": 0,
    "pipeline/cli/test_no_secrets.py": 2,
    "pipeline/data/images/test_pixels.py::test_killed_at_any_moment_it_goes_on_to_the_same_bytes": 1,
    "pipeline/data/images/test_pixels.py::test_the_commands": 0,
    "pipeline/deploy/test_openvino.py": 0,
    "pipeline/models/test_depthwise.py::test_compiled_it_trains_as_it_does_eagerly": 0,
    "pipeline/models/test_students.py::test_a_preset_builds_runs_and_comes_back_from_its_checkpoint": 3,
    "pipeline/models/test_text_towers.py": 4,
    "pipeline/precompute/test_clip_retrieval.py": 0,
    "pipeline/precompute/test_damage_s3.py": 4,
    "pipeline/precompute/test_import.py::test_killed_and_run_again_it_ends_in_the_same_bytes": 1,
    "pipeline/precompute/test_kill.py::test_killed_at_a_seeded_moment_nothing_is_lost_or_done_twice": 3,
    "pipeline/precompute/test_kill.py::test_killed_from_outside_again_and_again": 0,
    "pipeline/precompute/test_kill.py::test_one_that_wakes_up_after_the_seal_changes_nothing": 3,
    "pipeline/precompute/test_kill.py::test_processes_started_at_once_share_the_work": 3,
    "pipeline/precompute/test_mismatch.py": 8,
    "pipeline/precompute/test_prefect_ray.py": 0,
    "pipeline/precompute/test_ray.py": 0,
    "pipeline/precompute/test_repair.py": 8,
    "pipeline/precompute/test_stopped.py": 1,
    "pipeline/precompute/test_trouble_s3.py": 0,
    "pipeline/precompute/test_two_hosts.py": 0,
    "pipeline/precompute/test_trouble_s3.py::test_stopped_by_a_signal_it_says_how_to_go_on": 1,
    # retraining: new data, one crash, one rejection
    "pipeline/promote/test_retrain.py": 1,
    "pipeline/promote/test_retrain.py::test_another_teacher_stores_rows_as_the_newest_cache_does": 0,
    "pipeline/promote/test_retrain.py::test_int8_is_made_kept_and_copied_and_float16_is_left_with_a_word": 0,
    "pipeline/promote/test_retrain.py::test_layers_are_locked_where_there_is_a_champion_to_begin_with": 0,
    "pipeline/promote/test_retrain.py::test_the_decoder_and_views_of_the_cache_before_are_kept": 0,
    "pipeline/promote/test_retrain.py::test_what_was_begun_goes_on_as_it_began": 0,
    "pipeline/promote/test_retrain_ship.py": 0,
    "pipeline/report/test_report_browser.py": 0,
    "pipeline/report/test_report_browser.py::test_every_tab_draws_without_a_complaint_or_a_request": 1,
    "pipeline/train/test_gather.py": 6,
    "pipeline/train/test_open_clip_trainer.py::test_twenty_steps_on_photographs": 0,
    "pipeline/train/test_open_clip_trainer.py::test_two_ranks_with_two_workers_see_the_rows_of_the_live_teacher": 0,
    "pipeline/train/test_several_teachers.py::test_two_processes_and_parts_of_a_batch_train_as_one_whole_does": 0,
    "pipeline/train/test_stop_requests.py": 3,
    "pipeline/train/test_train_ranks.py": 1,
    "pipeline/train/test_train_ranks.py::test_under_torchrun_a_rank_that_fails_ends_all_ranks_and_is_told": 0,
    "pipeline/train/test_train_nodes.py::test_two_nodes_have_the_losses_of_one_process": 0,
    "pipeline/train/test_train_step.py::test_two_processes_train_as_one_does": 1,
    "pipeline/train/test_train_resume.py": 2,
    "pipeline/train/test_train_resume.py::test_killed_from_outside_it_goes_on_by_the_command_that_it_names": 0,
    "pipeline/train/test_trackers.py::test_the_run_is_seen_in_mlflows_pages": 0,
    "pipeline/train/test_trackers.py::test_trackio_has_every_step": 0,
    "storage/check/test_corruption.py": 33,
    "storage/files/test_azure.py": 0,
    "storage/files/test_object_store.py": 6,
    "storage/read/test_s3_cache.py": 4,
    "test_bench.py": 0,
    "test_container_stack.py": 0,
    "test_examples.py": 0,
    "test_fuzz.py": 8,
    "test_real_data.py": 0,
    "test_site.py": 0,
    "test_tutorial.py": 0,
    # seconds each: what they say is said again by a cheaper test, or by one of their cases
    "flows/test_service.py::test_cancelling_ends_the_process_and_leaves_a_cache_that_another_run_finishes": 0,
    "pipeline/cli/test_teacher_families.py::test_a_family_goes_through_every_command": 0,
    "pipeline/deploy/test_deploy.py::test_a_student_of_images_alone_is_measured_on_another_cache_and_fitted_to_its_own_images": 0,  # noqa: E501
    "pipeline/deploy/test_deploy.py::test_what_cannot_be_int8_is_said_and_not_shipped": 0,
    "pipeline/deploy/test_export_onnx.py::test_another_process_writes_the_same_bytes": 0,
    "pipeline/deploy/test_web.py": 0,
    "pipeline/models/test_inherit.py::test_a_student_of_13_6_million_begins_near_its_teacher": 0,
    "pipeline/precompute/test_more_views.py::test_killed_while_it_copies_and_encodes": 1,
    "pipeline/precompute/test_stopped.py::test_a_missing_right_is_named_and_the_cache_stays_sound": 0,
    "pipeline/train/test_cached_teacher.py::test_an_epoch_draws_its_order_once_and_drops_each_batch_once_used": 1,
    "pipeline/train/test_images_alone.py::test_parts_and_devices_change_nothing": 1,
    "pipeline/train/test_several_teachers.py::test_killed_at_a_step_it_goes_on_to_the_last_bit": 0,
    "pipeline/train/test_trackers.py::test_mlflow_has_every_step_once_where_the_run_was_killed": 0,
    "pipeline/train/test_trackers.py::test_one_that_cannot_begin_ends_the_run_before_its_first_step": 0,
    "pipeline/train/test_train_ranks.py::test_a_rank_that_fails_ends_all_ranks_and_is_told": 0,
    "pipeline/evaluate/twins/test_twins.py::test_planted_twins_are_found_in_every_form_of_cache": 2,
    "storage/files/test_object_store.py::test_workers_of_a_data_loader_read_files_that_were_opened_before": 0,
    "storage/read/test_compressed.py::test_every_damage_is_named_and_never_read": 11,
    "storage/read/test_int8.py::test_every_damage_is_named_and_never_read": 13,
    "storage/read/test_s3_cache.py::test_workers_of_a_data_loader_get_the_same_rows": 1,
    "storage/read/test_stream.py::test_damage_is_found_when_a_chunk_is_first_read": 7,
    "storage/write/test_workers.py::test_workers_of_a_data_loader_get_the_same_rows": 1,
    # the main job through the command line stays; further commands have their functions tested
    "flows/test_service.py::test_a_student_is_trained_and_measured": 0,
    "flows/test_service.py::test_a_wrong_parameter_fails_the_run_with_the_reason_and_no_retry": 0,
    "pipeline/deploy/test_deploy.py::test_the_command_says_all_of_it": 0,
    "pipeline/deploy/test_deploy.py::test_weights_that_are_not_the_student_ship_nothing": 1,
    "pipeline/deploy/test_export_onnx.py::test_images_and_texts_of_any_batch_and_length": 1,
    "pipeline/deploy/test_quantize.py::test_a_trained_trunk_stays_close_on_photographs": 0,
    "pipeline/deploy/test_quantize.py::test_a_trained_resnet_stays_close": 0,
    "pipeline/deploy/test_quantize.py::test_convolutions_get_fixed_ranges": 1,
    "pipeline/evaluate/test_cost.py::test_the_command_measures_teacher_and_student": 0,
    "pipeline/evaluate/test_zero_shot.py::test_a_real_teacher_tells_cifar10_apart": 0,
    "pipeline/evaluate/test_zero_shot.py::test_the_command_measures_teacher_and_student": 0,
    "pipeline/models/test_inherit.py::test_the_command_says_what_is_inherited_and_what_is_random": 0,
    "pipeline/models/test_locked_layers.py::test_two_processes_lock_as_one_does": 0,
    "pipeline/models/test_mean.py::test_the_command": 0,
    "pipeline/models/test_trunk_weights.py::test_the_packages_weights_recognise_photographs": 0,
    "pipeline/precompute/test_proof.py::test_the_command": 0,
    "pipeline/promote/test_registry.py::test_the_commands": 0,
    "pipeline/train/test_train_resume.py::test_the_variables_of_a_slurm_job_change_nothing": 1,
    "pipeline/train/test_train_step.py::test_a_compiled_student_learns_the_same": 0,
    "pipeline/train/test_train_step.py::test_an_error_in_a_process_comes_back_as_it_is": 0,
    "storage/observe/test_telemetry.py::test_a_taken_port_ends_the_command_that_named_it": 1,
    "test_demo.py": 0,
}

# a file is run by one process: the long ones begin first, so that none of them is alone at the end
LONGEST_FILES = (
    "flows/test_service.py",
    "pipeline/precompute/test_kill.py",
    "pipeline/deploy/test_deploy.py",
    "test_examples.py",
    "test_real_data.py",
    "test_container_stack.py",
    "test_tutorial.py",
    "test_site.py",
    "pipeline/train/test_trackers.py",
    "pipeline/train/test_train_resume.py",
    "pipeline/train/test_train_step.py",
    "pipeline/train/test_train_select.py",
    "pipeline/train/test_train_ranks.py",
    "pipeline/train/test_train.py",
    "pipeline/precompute/test_trouble_s3.py",
    "pipeline/precompute/test_stopped.py",
    "pipeline/precompute/test_more_views.py",
    "pipeline/precompute/test_ray.py",
    "pipeline/promote/test_retrain.py",
    "pipeline/deploy/test_quantize.py",
    "pipeline/cli/test_cli.py",
    "storage/read/test_int8.py",
    "storage/files/test_object_store.py",
)


def begin_with_longest(items: list[pytest.Item]) -> None:
    """Move the tests of ``LONGEST_FILES`` to the front, in that order; all others keep theirs."""
    ranks = {f"tests/{name}": rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Give the marker ``slow`` to each case that ``make test`` leaves out."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, cases in functions.items():
        number_run = _cases_of(name.removeprefix("tests/"))
        if number_run is None:
            continue
        run = {len(cases) * number // number_run for number in range(number_run)}
        for number, item in enumerate(cases):
            if number not in run:
                item.add_marker(pytest.mark.slow)


def _cases_of(name: str) -> int | None:
    entries = [entry for entry in CASES if name == entry or name.startswith((f"{entry}::", f"{entry}/"))]
    return CASES[max(entries, key=len)] if entries else None
