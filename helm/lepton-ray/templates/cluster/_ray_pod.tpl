{{/*
The pod template of the head or of a worker group. KubeRay takes the first container for the Ray node and gives it its
command and its probes. The token file has mode 0400 (256); the kubelet adds read for the pod's fsGroup, which only uid
10001 is in.
Takes: root, role ("head" or "worker"), group (resources, nodeSelector, tolerations), autoscaler (bool).
*/}}
{{- define "lepton-ray.rayPod" -}}
{{- $root := .root -}}
{{- $base := include "lepton-ray.base" $root -}}
metadata:
  labels:
    {{- include "lepton-ray.selector" $root | nindent 4 }}
    app.kubernetes.io/component: ray-{{ .role }}
  {{- if $root.Values.metrics.annotations }}
  annotations: {{- include "lepton-ray.scrapeAnnotations" 8080 | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ $base }}-{{ .role }}
  {{- include "lepton-ray.podCommon" $root | nindent 2 }}
  terminationGracePeriodSeconds: {{ $root.Values.cluster.terminationGracePeriodSeconds }}
  {{- with .group.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ .role }}
      image: {{ include "lepton-ray.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- include "lepton-ray.securityContext" $root | nindent 8 }}
      resources: {{- include "lepton-ray.resources" .group.resources | nindent 8 }}
      ports: {{- include (printf "lepton-ray.%sPorts" .role) $root | nindent 8 }}
      env: {{- include "lepton-ray.rayEnv" $root | nindent 8 }}
      envFrom: {{- include "lepton-ray.storeEnvFrom" $root | nindent 8 }}
      volumeMounts:
        {{- include "lepton-ray.scratchMounts" $root | nindent 8 }}
        {{- if $root.Values.storage.existingClaim }}
        {{- include "lepton-ray.storeMount" $root | nindent 8 }}
        {{- end }}
        {{- if $root.Values.auth.enabled }}
        - name: ray-token
          mountPath: /var/run/lepton-ray/token
          readOnly: true
        {{- end }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: {{ $root.Values.cluster.scratchSize }}
    - name: home
      emptyDir:
        sizeLimit: 1Gi
    {{- if $root.Values.storage.existingClaim }}
    {{- include "lepton-ray.storeVolume" $root | nindent 4 }}
    {{- end }}
    {{- if $root.Values.auth.enabled }}
    - name: ray-token
      secret:
        secretName: {{ include "lepton-ray.tokenSecret" $root }}
        defaultMode: 256
        items:
          - key: auth_token
            path: auth_token
    {{- end }}
    {{- if .autoscaler }}
    {{- include "lepton-ray.autoscalerToken" $root | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "lepton-ray.headPorts" -}}
- name: gcs-server
  containerPort: 6379
- name: dashboard
  containerPort: 8265
- name: metrics
  containerPort: 8080
- name: serve
  containerPort: {{ .Values.serve.port }}
{{- end }}

{{- define "lepton-ray.workerPorts" -}}
- name: metrics
  containerPort: 8080
- name: serve
  containerPort: {{ .Values.serve.port }}
{{- end }}

{{/*
RAY_AUTH_TOKEN is empty on purpose: KubeRay puts the token itself into this variable where it is missing, and every job
would inherit it. Ray passes over an empty one and reads the file.
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S: on SIGTERM Ray drains the node this long; the kubelet kills 15 s later.
RAY_SERVE_DEFAULT_HTTP_HOST: endpoints are called through the Service, so the proxies listen on the pod's address.
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH: limits on headers, before Serve looks at a request.
The rest is what lepton_ray/cluster.py sets for a Ray that it starts itself; its comments say why.
*/}}
{{- define "lepton-ray.rayEnv" -}}
{{- if .Values.auth.enabled -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN_PATH
  value: /var/run/lepton-ray/token/auth_token
- name: RAY_AUTH_TOKEN
  value: ""
{{- else -}}
- name: RAY_AUTH_MODE
  value: disabled
{{- end }}
- name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
  value: {{ sub .Values.cluster.terminationGracePeriodSeconds 15 | quote }}
- name: RAY_SERVE_DEFAULT_HTTP_HOST
  value: 0.0.0.0
- name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
  value: lepton_ray.serving.edge:middlewares
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO
  value: "0"
- name: RAY_TRAIN_HEALTH_CHECK_INTERVAL_S
  value: "0.5"
- name: RAY_TRAIN_METRICS_ENABLED
  value: "0"
- name: RAY_CHDIR_TO_TRIAL_DIR
  value: "0"
- name: TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
  value: "3"
{{- end }}

{{/* The API token of the autoscaler, mounted into its container only: the code of jobs runs beside it in the head's. */}}
{{- define "lepton-ray.autoscalerToken" -}}
- name: autoscaler-api-token
  projected:
    defaultMode: 256
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 3600
      - configMap:
          name: kube-root-ca.crt
          items:
            - key: ca.crt
              path: ca.crt
      - downwardAPI:
          items:
            - path: namespace
              fieldRef:
                fieldPath: metadata.namespace
{{- end }}
