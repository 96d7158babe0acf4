# What a job gets that asks for nothing else. Jobs override the command, variables, vCPUs, memory,
# GPUs and the number of nodes; the rest can only be said here.

locals {
  container = {
    image            = "${aws_ecr_repository.this.repository_url}:${var.image_tag}"
    command          = ["--help"]
    jobRoleArn       = aws_iam_role.job.arn
    executionRoleArn = aws_iam_role.execution.arn
    privileged       = false
    resourceRequirements = [
      { type = "VCPU", value = tostring(var.job_vcpus) },
      { type = "MEMORY", value = tostring(var.job_memory_mib) },
    ]
    linuxParameters = {
      # Signals reach a command that is not process 1, and what it leaves behind is reaped.
      initProcessEnabled = true
      sharedMemorySize   = var.shared_memory_mib
    }
    # Loader workers pass tensors as open files, of which ECS allows 1024.
    ulimits = [{ name = "nofile", softLimit = 65536, hardLimit = 65536 }]
    environment = [
      # Batch does not say where it runs, and boto3 has to know.
      { name = "AWS_DEFAULT_REGION", value = var.region },
      # A container of a job of several nodes has a second interface, ecs-eth0, on which nobody but
      # its own host can be reached. Left to itself, NCCL may take it.
      { name = "NCCL_SOCKET_IFNAME", value = "^lo,docker,ecs-eth" },
    ]
    secrets = [for name, arn in var.secret_arns : { name = name, valueFrom = arn }]
    logConfiguration = {
      logDriver = "awslogs"
      options = {
        "awslogs-group"         = aws_cloudwatch_log_group.this.name
        "awslogs-region"        = var.region
        "awslogs-stream-prefix" = var.name
      }
    }
  }

  nodes = {
    # Each job says how many it wants, which an open range of nodes allows.
    numNodes = 2
    mainNode = 0
    nodeRangeProperties = [
      { targetNodes = "0:", container = local.container },
    ]
  }
}

resource "aws_batch_job_definition" "single" {
  name                  = "${var.name}-single"
  type                  = "container"
  platform_capabilities = ["EC2"]
  propagate_tags        = true
  container_properties  = jsonencode(local.container)

  retry_strategy {
    attempts = var.job_attempts

    # A Spot instance was taken away, or a host failed: the run goes on from its last checkpoint.
    evaluate_on_exit {
      on_status_reason = "Host EC2*"
      action           = "RETRY"
    }

    evaluate_on_exit {
      on_reason = "*"
      action    = "EXIT"
    }
  }

  timeout {
    attempt_duration_seconds = var.job_timeout_hours * 3600
  }
}

resource "aws_batch_job_definition" "multi" {
  name            = "${var.name}-multi"
  type            = "multinode"
  propagate_tags  = true
  node_properties = jsonencode(local.nodes)

  retry_strategy {
    attempts = var.job_attempts

    # A lost node shows on the main node as an error of its own; only a command that cannot be
    # understood will not be understood next time either.
    evaluate_on_exit {
      on_exit_code = "2"
      action       = "EXIT"
    }
  }

  timeout {
    attempt_duration_seconds = var.job_timeout_hours * 3600
  }
}
