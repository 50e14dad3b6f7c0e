#!/usr/bin/env python3
"""Writes Sluice's Grafana dashboard. It is made here and never edited by hand:

    ops/grafana/dashboard.py > ops/grafana/sluice.json

Grafana imports the file (Dashboards, New, Import) and asks for the Prometheus to read from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

WIDTH = 24  # columns of a Grafana page
PANEL_WIDTH = 8
PANEL_HEIGHT = 7
BUILD_INFO = '{__name__=~"sluiced_build_info|sluice_train_build_info"}'
SELECT = '{job=~"$job", instance=~"$instance"}'


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    queries: dict[str, str]  # legend -> PromQL
    description: str = ""
    lowest: int | None = 0
    stacked: bool = False


def rate(metric: str, by: str = "instance") -> str:
    return f"sum by ({by}) (rate({metric}{SELECT}[$__rate_interval]))"


def gauge(metric: str) -> str:
    return f"{metric}{SELECT}"


def quantile(share: float, metric: str) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{SELECT}[$__rate_interval])))"


def quantiles(metric: str) -> dict[str, str]:
    return {f"{round(share * 100)} %": quantile(share, metric) for share in (0.5, 0.99)}


ROWS: dict[str, list[Panel]] = {
    "Work": [
        Panel("Documents scored", "docs/s", {"{{instance}}": rate("sluiced_documents_scored_total")}),
        Panel("Tokens scored", "tokens/s", {"{{instance}}": rate("sluiced_tokens_scored_total")}),
        Panel("Records read", "records/s", {"{{instance}}": rate("sluiced_documents_read_total")}),
        Panel("Tokens read", "tokens/s", {"{{instance}}": rate("sluiced_tokens_read_total")}),
        Panel(
            "Records behind",
            "short",
            {"{{instance}}": gauge("sluiced_consumer_lag_records")},
            "Records of the assigned partitions that are not published yet.",
        ),
        Panel(
            "Dead letters",
            "records/s",
            {"{{reason}}": rate("sluiced_dead_letters_total", by="reason") + " > 0"},
            "Records that could not be scored, by reason. Empty where there are none.",
        ),
        Panel(
            "Time to catch up",
            "s",
            {"{{job}}": 'job:sluiced_catch_up:seconds{job=~"$job"}'},
            "Records behind, over records finished a second.",
        ),
    ],
    "Model": [
        Panel("Time of a batch", "s", quantiles("sluiced_batch_seconds")),
        Panel(
            "Share of time in the model",
            "percentunit",
            {
                "{{instance}}": rate("sluiced_batch_seconds_sum"),
                "{{instance}}, idle with documents there": rate("sluiced_model_starved_seconds_total"),
            },
            "1 where the device never waits for documents.",
        ),
        Panel(
            "Tokens computed for each real one",
            "short",
            {"{{instance}}": f"{rate('sluiced_padded_tokens_total')} / {rate('sluiced_model_tokens_total')}"},
            "1 without padding.",
        ),
        Panel("Rows of a batch", "short", quantiles("sluiced_batch_rows")),
        Panel("Tokens of a row, with padding", "short", quantiles("sluiced_batch_row_tokens")),
        Panel(
            "Batches split after a failure",
            "batches/s",
            {"{{instance}}": rate("sluiced_batches_split_total")},
        ),
    ],
    "Latency and queues": [
        Panel("From reading to losses", "s", quantiles("sluiced_read_to_scored_seconds")),
        Panel("From reading to commit", "s", quantiles("sluiced_read_to_committed_seconds")),
        Panel("Publishing and committing a group", "s", quantiles("sluiced_publish_seconds")),
        Panel(
            "Tokens that wait",
            "short",
            {"for {{queue}}": f"sum by (queue) ({gauge('sluiced_queued_tokens')})"},
        ),
        Panel(
            "Tokens in flight",
            "short",
            {
                "{{instance}}": gauge("sluiced_in_flight_tokens"),
                "{{instance}} paused": gauge("sluiced_paused"),
            },
            "From reading to commit. Paused is 1 while reading waits for room.",
        ),
        Panel(
            "Age of the oldest record in flight",
            "s",
            {"{{instance}}": gauge("sluiced_oldest_in_flight_seconds")},
        ),
    ],
    "Kafka": [
        Panel(
            "Commits and aborts",
            "1/s",
            {
                "commits": rate("sluiced_commits_total", by="job"),
                "aborts": rate("sluiced_aborts_total", by="job"),
                "failed commits": rate("sluiced_commit_failures_total", by="job"),
            },
        ),
        Panel(
            "Fences, rebalances and client errors",
            "1/s",
            {
                "fenced by {{by}}": rate("sluiced_fences_total", by="by"),
                "rebalances": rate("sluiced_rebalances_total", by="job"),
                "client errors": rate("sluiced_kafka_errors_total", by="job"),
                "producers replaced": rate("sluiced_producers_replaced_total", by="job"),
            },
        ),
        Panel(
            "Assigned partitions, and whether a broker answers",
            "short",
            {
                "{{instance}} partitions": gauge("sluiced_assigned_partitions"),
                "{{instance}} not read yet": gauge("sluiced_unplaced_partitions"),
                "{{instance}} broker": gauge("sluiced_broker_up"),
            },
        ),
    ],
    "Process": [
        Panel(
            "Ready",
            "short",
            {"{{instance}}": gauge("sluiced_ready")},
        ),
        Panel(
            "Time since a loop has turned",
            "s",
            {"{{instance}} {{loop}}": gauge("sluiced_loop_idle_seconds")},
        ),
        Panel(
            "Resident memory",
            "bytes",
            {"{{instance}}": gauge("process_resident_memory_bytes")},
        ),
        Panel(
            "Memory of the GPU",
            "bytes",
            {
                "{{instance}} {{device}} in use": gauge("sluiced_device_memory_used_bytes"),
                "{{instance}} {{device}} in all": gauge("sluiced_device_memory_total_bytes"),
            },
            "As NVIDIA's driver knows it, whoever uses it. Empty on a CPU.",
        ),
        Panel(
            "CPU",
            "cores",
            {"{{instance}}": rate("process_cpu_seconds_total")},
        ),
        Panel(
            "Build and model",
            "short",
            {
                "{{instance}} {{version}}": gauge("sluiced_build_info"),
                "{{instance}} {{precision}} on {{device}}: {{fingerprint}}": gauge("sluiced_model_info"),
            },
        ),
        Panel(
            "Reloads of the configuration",
            "1/s",
            {"{{outcome}}": rate("sluiced_config_reloads_total", by="outcome")},
        ),
    ],
    "Training: losses and selection": [
        Panel(
            "Loss of a step",
            "nats",
            {"{{instance}} {{tokens}}": gauge("sluice_train_loss_nats")},
            "Mean over the tokens kept, dropped, and all.",
        ),
        Panel("Loss on held-out text", "nats", {"{{instance}} {{set}}": gauge("sluice_train_eval_loss_nats")}),
        Panel(
            "Share of tokens kept",
            "percentunit",
            {
                "{{instance}}": f"{rate('sluice_train_tokens_kept_total')} / {rate('sluice_train_tokens_eligible_total')}",
                "{{instance}} asked for": gauge("sluice_train_keep_ratio"),
            },
            "Of those that could be chosen.",
        ),
        Panel(
            "Lowest score kept",
            "short",
            {"{{instance}}": gauge("sluice_train_selection_threshold")},
            "With the default score, excess loss in nats.",
            lowest=None,
        ),
        Panel(
            "Learning rate",
            "sci",
            {"{{instance}}": gauge("sluice_train_learning_rate")},
        ),
        Panel(
            "Gradient norm",
            "short",
            {"{{instance}}": gauge("sluice_train_gradient_norm")},
            "Global, before clipping.",
        ),
    ],
    "Training: pace and data": [
        Panel(
            "Tokens seen and learnt from",
            "tokens/s",
            {
                "{{instance}} seen": rate("sluice_train_tokens_total"),
                "{{instance}} learnt from": rate("sluice_train_tokens_kept_total"),
            },
        ),
        Panel("Documents", "docs/s", {"{{instance}}": rate("sluice_train_documents_total")}),
        Panel(
            "What the time goes into",
            "percentunit",
            {"{{stage}}": rate("sluice_train_stage_seconds_total", by="stage")},
            "Shares of a trainer's time, which add up to 1. *data* is the wait for documents.",
            stacked=True,
        ),
        Panel("Time of a step", "s", quantiles("sluice_train_step_seconds")),
        Panel(
            "Records of the topic not read yet",
            "short",
            {"{{instance}}": gauge("sluice_train_stream_lag_records")},
        ),
        Panel(
            "Documents that wait to be learnt from",
            "short",
            {"in {{place}}": f"sum by (place) ({gauge('sluice_train_buffered_documents')})"},
        ),
        Panel(
            "Steps done and planned",
            "short",
            {
                "{{instance}} done": gauge("sluice_train_step"),
                "{{instance}} in the last checkpoint": gauge("sluice_train_checkpoint_step"),
                "{{instance}} planned": gauge("sluice_train_steps_planned"),
            },
        ),
        Panel(
            "Age of the last checkpoint",
            "s",
            {"{{instance}}": f"time() - {gauge('sluice_train_checkpoint_timestamp_seconds')}"},
            "What would be lost if the trainer were killed now.",
        ),
        Panel(
            "Checkpoints, and what went wrong",
            "1/s",
            {
                "checkpoints": rate("sluice_train_checkpoint_seconds_count", by="job"),
                "failed checkpoints": rate("sluice_train_checkpoint_failures_total", by="job"),
                "records refused: {{reason}}": rate("sluice_train_records_rejected_total", by="reason"),
                "records without a document": rate("sluice_train_records_skipped_total", by="job"),
                "steps refused: {{reason}}": rate("sluice_train_steps_refused_total", by="reason"),
            },
        ),
        Panel(
            "Build and run",
            "short",
            {
                "{{instance}} {{version}}": gauge("sluice_train_build_info"),
                "{{instance}} {{command}} {{objective}}: {{run}}": gauge("sluice_train_run_info"),
            },
        ),
    ],
}


def variable(name: str, query: str) -> dict[str, object]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def panel_json(panel: Panel, id: int, x: int, y: int) -> dict[str, object]:
    defaults: dict[str, object] = {"unit": panel.unit}
    if panel.lowest is not None:
        defaults["min"] = panel.lowest
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 40}
    return {
        "id": id,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"h": PANEL_HEIGHT, "w": PANEL_WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend}
            for index, (legend, expression) in enumerate(panel.queries.items())
        ],
    }


def dashboard() -> dict[str, object]:
    panels: list[dict[str, object]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({
            "id": len(panels) + 1,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y},
            "panels": [],
        })
        y += 1
        for index, panel in enumerate(row):
            x = index * PANEL_WIDTH % WIDTH
            panels.append(panel_json(panel, len(panels) + 1, x, y))
            if x + PANEL_WIDTH == WIDTH or index == len(row) - 1:
                y += PANEL_HEIGHT
    return {
        "uid": "sluice",
        "title": "Sluice",
        "tags": ["sluice"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}},
                variable("job", f"label_values({BUILD_INFO}, job)"),
                variable("instance", f'label_values({BUILD_INFO}, instance)'.replace("}", ', job=~"$job"}')),
            ]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
