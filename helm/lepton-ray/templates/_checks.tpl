{{/*
What values.schema.json cannot say, and the vital rules once more: `--skip-schema-validation` exists.
One line each: the key, the value, what was expected, what to do.
*/}}
{{- define "lepton-ray.checks" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .Release.Name) -}}
{{- fail (printf "release name %q: expected a-z, 0-9 and '-', a letter first, because a RayCluster takes its name: install under another name" .Release.Name) -}}
{{- end -}}
{{- if ne .Values.cluster.mode "kuberay" -}}
{{- fail (printf "cluster.mode: %q, expected kuberay" .Values.cluster.mode) -}}
{{- end -}}
{{- if or (not .Values.image.tag) (eq (toString .Values.image.tag) "latest") -}}
{{- fail (printf "image.tag: %q, expected a fixed tag: pods of one cluster must run the same code" (toString .Values.image.tag)) -}}
{{- end -}}
{{- if and (not .Values.auth.enabled) (not .Values.auth.iUnderstandThisIsUnsafe) -}}
{{- fail "auth.enabled: false, expected true: without the token anybody who reaches the dashboard port runs code; auth.iUnderstandThisIsUnsafe=true accepts that" -}}
{{- end -}}
{{- include "lepton-ray.checks.storage" . -}}
{{- include "lepton-ray.checks.workerGroups" . -}}
{{- include "lepton-ray.checks.operator" . -}}
{{- end }}

{{- define "lepton-ray.checks.storage" -}}
{{- with .Values.storage -}}
{{- if not .uri -}}
{{- fail "storage.uri: empty, expected where results are kept: --set storage.uri=s3://bucket/prefix (and storage.existingSecret), or file:///mnt/... with storage.existingClaim" -}}
{{- end -}}
{{- if contains "@" .uri -}}
{{- fail "storage.uri: holds an '@', expected no credentials in it: put them into a Secret and name it in storage.existingSecret" -}}
{{- end -}}
{{- if and (hasPrefix "file://" .uri) (not .existingClaim) -}}
{{- fail (printf "storage.uri: %q without storage.existingClaim, expected a ReadWriteMany claim there: a folder of one pod is no store for a cluster; or use s3://" .uri) -}}
{{- end -}}
{{- if not (regexMatch "^(s3://.|file:///mnt/.)" .uri) -}}
{{- fail (printf "storage.uri: %q, expected s3://bucket/prefix or file:///mnt/..." .uri) -}}
{{- end -}}
{{- if and (hasPrefix "s3://" .uri) .existingClaim -}}
{{- fail (printf "storage.existingClaim: %q, expected none with an s3:// storage.uri: leave one of them out" .existingClaim) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "lepton-ray.checks.workerGroups" -}}
{{- $seen := dict -}}
{{- range .Values.cluster.workerGroups -}}
{{- if hasKey $seen .name -}}
{{- fail (printf "cluster.workerGroups: name %q twice, expected each once" .name) -}}
{{- end -}}
{{- $_ := set $seen .name true -}}
{{- if or (gt (int .minReplicas) (int .replicas)) (gt (int .replicas) (int .maxReplicas)) -}}
{{- fail (printf "cluster.workerGroups %q: minReplicas %d, replicas %d, maxReplicas %d, expected minReplicas <= replicas <= maxReplicas" .name (int .minReplicas) (int .replicas) (int .maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A real API server lists kinds ("v1/Pod"); `helm template` and `helm lint` without one list group versions only. */}}
{{- define "lepton-ray.checks.operator" -}}
{{- if and (.Capabilities.APIVersions.Has "v1/Pod") (not (.Capabilities.APIVersions.Has "ray.io/v1/RayCluster")) -}}
{{- fail "this cluster has no RayCluster (ray.io/v1): install the KubeRay operator first: helm repo add kuberay https://ray-project.github.io/kuberay-helm/ && helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0 --namespace kuberay --create-namespace" -}}
{{- end -}}
{{- end }}
